"""Which settings make two runs the same experiment, and which only say where and how it ran."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from common.config import RunConfig, TrainingSection

INCIDENTAL = frozenset({
    "cache-dir", "checkpoint-every", "client-keys", "client-threads", "data-dir",
    "keep-checkpoints", "message-timeout-s", "min-clients", "output-dir", "resume-from",
    "run-name", "state-dir", "wait-for-clients-s", "warm-worker",
})  # fmt: skip
"""Keys that change no result of a run that completed."""

DATA_KEYS = (
    "dataset", "data-dir", "partition", "num-partitions", "classes-per-client", "dirichlet-alpha",
    "min-client-examples", "max-client-examples", "partition-options", "test-fraction",
    "image-size",
)  # fmt: skip
"""Keys that, with the seed, decide which examples a client has."""


LOCAL_KEYS = (
    "rounds", *sorted(TrainingSection.key_names()), "evaluation", "evaluate-every",
)  # fmt: skip
"""Keys that, with the data, the models and the seed, decide what a client reaches alone."""


def complete_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of keys that a config.json, written by older code, does not have."""
    return {**RunConfig().flat(), **flat}


def essential(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, seed among them, that decide a run's result and are not the default.

    Keys that the code gains later do not change it, as long as their default keeps the behaviour.
    """
    default = RunConfig().flat()
    kept = {
        key: value
        for key, value in flat.items()
        if key not in INCIDENTAL and value != default.get(key)
    }
    if flat.get("server-rule") == "least-squares":  # their defaults were others once
        kept |= {key: flat[key] for key in ("shared-momentum", "personal-gain") if key in flat}
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
