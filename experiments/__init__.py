"""The command line, presets, engines and reports. Imports anything; nobody imports it."""
