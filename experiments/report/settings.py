"""Which settings make two runs the same experiment, and the command that makes a run again."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import RunConfig, TrainingSection
from experiments.run.presets import Preset, preset_names

if TYPE_CHECKING:
    from experiments.report.runs import Run

INCIDENTAL = frozenset({
    "cache-dir", "checkpoint-every", "client-keys", "client-threads", "data-dir",
    "keep-checkpoints", "measure-alone", "message-timeout-s", "min-clients", "output-dir",
    "resume-from", "run-name", "state-dir", "wait-for-clients-s",
})  # fmt: skip
"""Keys that change no result of a run that completed."""

DATA_KEYS = (
    "dataset", "data-dir", "partition", "num-partitions", "classes-per-client", "dirichlet-alpha",
    "min-client-examples", "max-client-examples", "partition-options", "test-fraction",
    "validation-fraction", "image-size", "tested-on",
)  # fmt: skip
"""Keys that, with the seed, decide which examples a client has."""

LOCAL_KEYS = (
    "rounds", "augmentation", *sorted(TrainingSection.key_names()), "evaluation", "evaluate-every",
)  # fmt: skip
"""Keys that, with the data, the models and the seed, decide what a client reaches alone."""

NOT_SET = (INCIDENTAL - {"data-dir", "measure-alone"}) | {"num-partitions", "seed"}
"""Keys that a command that repeats a run does not set, or not by `--set`."""


def complete_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of keys that a config.json, written by other code, does not have."""
    return {**RunConfig().flat(), **flat}


def essential(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, seed among them, that decide a run's result and are not the default."""
    default = RunConfig().flat()
    kept = {k: v for k, v in flat.items() if k not in INCIDENTAL and v != default.get(k)}
    own_data = flat.get("dataset") == "folder" or ":" in str(flat.get("dataset", ""))
    if own_data and flat.get("data-dir"):
        kept["data-dir"] = flat["data-dir"]  # here the folder is the data, not a copy of it
    return kept


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short name, six hexadecimal digits, of some settings; their order is immaterial."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def data_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides, with the seed, which examples each client has."""
    full = complete_settings(flat)
    kept = {key: full[key] for key in DATA_KEYS}
    if "data-dir" not in essential(full):
        kept.pop("data-dir")
    return kept


def local_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides, with data, models and seed, what a client reaches alone.

    How often a run is evaluated counts only where its last round goes without.
    """
    full = complete_settings(flat)
    kept = {key: full[key] for key in LOCAL_KEYS}
    if kept["evaluation"] == "fused" or kept["rounds"] % kept["evaluate-every"] == 0:
        kept["evaluate-every"] = 1
    return kept


def run_command(run: Run) -> str:
    """Return a command that repeats a run: a sweep's own, or the nearest preset's with changes."""
    noted = run.note.get("command")
    return str(noted) if noted else _nearest(complete_settings(run.config))


def local_command(run: Run) -> str:
    """Return a command that makes the Local run which another run is to be compared with."""
    alone = {**complete_settings(run.config), "method": "local"}
    return _nearest(alone, {*DATA_KEYS, *LOCAL_KEYS, "method", "models"})


def sweep_command(run: Run) -> str:
    """Return the sweep that a run belongs to, "" where it was started alone."""
    file = run.note.get("file")
    return f"mh-pfedhn sweep {short_path(Path(file))}" if file else ""


def value_text(value: Any) -> str:
    """Write a value as it stands behind `--set key=`.

    >>> value_text(True), value_text(0.02), value_text("cnn,mlp")
    ('true', '0.02', 'cnn,mlp')
    """
    return value if isinstance(value, str) else json.dumps(value)


def short_path(path: Path) -> str:
    """Write a path as a person here would type it, from the working folder or from the root."""
    return min(os.path.relpath(path), str(path), key=len)


def _nearest(full: Mapping[str, Any], keys: Iterable[str] | None = None) -> str:
    """Write the command of settings; only `keys` (None: all) need to be as they say."""
    wanted = (set(full) if keys is None else set(keys)) - NOT_SET
    known = _preset_settings()
    changes = {
        name: {k: full[k] for k in full if k in wanted and k in base and full[k] != base[k]}
        for name, base in known.items()
    }
    own = str(full["run-name"])
    name = own if own in changes else min(changes, key=lambda n: (len(changes[n]), n))
    clients = full["num-partitions"]
    pairs = [f"{k}={value_text(v)}" for k, v in changes[name].items()]
    return shlex.join([
        "mh-pfedhn", "run", name,
        *(["--clients", str(clients)] if clients != known[name]["num-partitions"] else []),
        "--seed", str(full["seed"]), *(["--set", *pairs] if pairs else []),
    ])  # fmt: skip


@cache
def _preset_settings() -> dict[str, dict[str, Any]]:
    return {name: dict(Preset.load(name).config.flat()) for name in preset_names()}
