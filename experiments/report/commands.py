"""The command line that makes a run again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.runs import Run
from experiments.report.settings import DATA_KEYS, INCIDENTAL, LOCAL_KEYS, complete_settings
from experiments.run.presets import Preset, preset_names
from experiments.sweep.cells import read_note
from experiments.sweep.plan import value_text

ENGINE_KEYS = {"num-partitions", "seed"}
Presets = Mapping[str, Mapping[str, Any]]
ALONE = frozenset({*DATA_KEYS, *LOCAL_KEYS, "method", "models"})


def short_path(path: Path) -> str:
    """Write a path as a person here would type it: below the working folder, or below home."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return prefix + (str(path.relative_to(base)) or ".")
    return os.path.relpath(path) if len(os.path.relpath(path)) < len(str(path)) else str(path)


def sweep_command(run: Run) -> str | None:
    """Return the sweep that a run belongs to, None where it was started alone."""
    note = read_note(run.folder)
    return f"mh-pfedhn sweep {short_path(Path(note['file']))}" if note.get("file") else None


def run_command(run: Run, presets: Presets | None = None) -> str:
    """Return a command that repeats a run: the preset nearest to it, and what differs.

    `presets` are what `preset_settings` returns, for many calls.
    """
    known = presets if presets is not None else preset_settings()
    full = complete_settings(run.config)
    return _nearest(full, known, frozenset(full))


def local_command(run: Run, presets: Presets | None = None) -> str:
    """Return a command that makes the Local run which another run is to be compared with."""
    known = presets if presets is not None else preset_settings()
    return _nearest({**complete_settings(run.config), "method": "local"}, known, ALONE)


def _nearest(full: Mapping[str, Any], known: Presets, keys: frozenset[str]) -> str:
    """Write the command of settings; only some keys need to be as they say."""
    own = str(full["run-name"])
    changes = {name: _changes(full, base, keys) for name, base in known.items()}
    name = own if own in changes else min(changes, key=lambda n: (len(changes[n]), n))
    change = changes[name]
    clients = full["num-partitions"]
    words = ["mh-pfedhn", "run", name]
    words += [] if clients == known[name]["num-partitions"] else ["--clients", str(clients)]
    words += ["--seed", str(full["seed"])]
    words += ["--set", *(f"{k}={value_text(v)}" for k, v in change.items())] if change else []
    return shlex.join(words)


def preset_settings() -> dict[str, dict[str, Any]]:
    """Return all settings of every preset, by its name."""
    return {name: dict(Preset.load(name).config.flat()) for name in preset_names()}


def _changes(
    full: Mapping[str, Any], base: Mapping[str, Any], keys: frozenset[str]
) -> dict[str, Any]:
    skipped = (INCIDENTAL - {"data-dir"}) | ENGINE_KEYS
    return {
        key: value
        for key, value in full.items()
        if key in keys and key in base and key not in skipped and value != base[key]
    }
