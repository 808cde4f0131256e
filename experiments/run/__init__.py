"""One run from start to end: presets, engines, progress."""
