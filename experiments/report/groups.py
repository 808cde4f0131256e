"""Group runs of the same settings and different seeds; mean and standard error over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

from common.errors import RunError, listing
from common.methods import METHODS
from experiments.report.looks import method_label
from experiments.report.runs import Run, find_run, is_run, run_folders
from experiments.report.settings import complete_settings, digest, essential

NAMED_KEYS = 3
LONGEST_VALUE = 24


@dataclass(frozen=True)
class Stat:
    """A mean over seeds and its standard error; no error where there is one value."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Take the values that exist and are finite; None where there are none.

        The error is the sample standard deviation (n - 1) over the square root of n.
        """
        kept = [float(v) for v in values if v is not None and math.isfinite(v)]
        if not kept:
            return None
        error = stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else None
        return cls(fmean(kept), error, len(kept))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    `settings` are what decides the result and is not the default. Only `counted` runs enter means:
    completed, one for each seed.
    """

    label: str
    short: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.settings["method"])

    @property
    def key(self) -> str:
        """A short name of the settings."""
        return digest(self.settings)

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that enter means."""
        return tuple(run for run in self.runs if not run.left_out)

    @property
    def left_out(self) -> tuple[Run, ...]:
        """The runs that do not: unfinished, failed, or a seed that is there twice."""
        return tuple(run for run in self.runs if run.left_out)

    def stat(self, value: Callable[[Run], float | None]) -> Stat | None:
        """Return mean and standard error of a value over the seeds."""
        return Stat.of(value(run) for run in self.counted)

    def last(self, key: str) -> Stat | None:
        """Return mean and standard error of a value of the last evaluated round."""
        return self.stat(lambda run: run.last(key))


@dataclass(frozen=True)
class Study:
    """Everything that was found: groups in the order of their methods, and unreadable folders."""

    groups: tuple[Group, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]


def load_study(names: Sequence[str]) -> Study:
    """Load runs by their folders or names; a folder of runs stands for all of them.

    Raises RunError or ConfigError where a run by name is not there, or there is no run at all.
    """
    folders: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser().resolve()
        single = is_run(path) or not path.is_dir()
        folders |= dict.fromkeys([find_run(name).folder] if single else run_folders(path))
    if not folders:
        raise RunError(
            f"no run below {listing(names)}: no folder there holds summary.json or metrics.jsonl. "
            "A sweep writes its runs below its output-dir."
        )
    runs, unreadable = [], []
    for folder in folders:
        try:
            runs.append(Run.load(folder))
        except RunError as error:
            unreadable.append(str(error))
    return Study(group_runs(runs), tuple(unreadable))


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Group runs that differ in their seed alone; name the groups by what tells them apart."""
    found: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        settings = essential(run.config)
        settings.pop("seed", None)
        settings["method"] = run.method
        found.setdefault(digest(settings), (settings, []))[1].append(run)
    drafts = sorted(found.values(), key=lambda draft: _order(*draft))
    return tuple(
        Group(label, short, settings, _judged(members))
        for (settings, members), (label, short) in zip(drafts, _names(drafts), strict=True)
    )


def _judged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Say of each run whether it counts: completed, and the newest one of its seed."""
    seen: set[int] = set()
    judged = []
    for run in sorted(runs, key=Run.changed_at, reverse=True):
        reason = ""
        if run.status != "completed":
            reason = f"{run.status} after round {run.rounds_done} of {run.rounds_planned}"
        elif run.seed in seen:
            reason = f"an older run of seed {run.seed}"
        else:
            seen.add(run.seed)
        judged.append(replace(run, left_out=reason))
    return tuple(sorted(judged, key=lambda run: (run.seed, bool(run.left_out), run.name)))


Draft = tuple[Mapping[str, Any], Sequence[Run]]


def _names(drafts: Sequence[Draft]) -> list[tuple[str, str]]:
    """Return (label, short label) of each group: the variant or method, and what differs."""
    every = [settings for settings, _ in drafts]
    folders = {runs[0].name for _, runs in drafts if len(runs) == 1}
    from_sweep = any(run.variant for _, runs in drafts for run in runs)
    if len(_differing(every)) > NAMED_KEYS and not from_sweep and len(folders) == len(drafts):
        return [(runs[0].name, runs[0].name) for _, runs in drafts]  # too much for a label
    variants = [{run.variant for run in runs} - {""} for _, runs in drafts]
    bases = [own.pop() if len(own) == 1 else method_label(settings["method"])
             for own, settings in zip(variants, every, strict=True)]  # fmt: skip
    one_base = len(set(bases)) == 1
    names = []
    for settings, base in zip(every, bases, strict=True):
        rivals = [s for s, b in zip(every, bases, strict=True) if b == base]
        keys = [k for k in _differing(rivals) if k != "method" or one_base][:NAMED_KEYS]
        full = complete_settings(settings)
        values = [_brief(full.get(key)) for key in keys]
        label = ", ".join([base, *(f"{k} {v}" for k, v in zip(keys, values, strict=True))])
        joined = "/".join(values)  # with one method alone its name says nothing
        names.append((label, joined if joined and one_base else f"{base} {joined}".rstrip()))
    labels = [label for label, _ in names]
    marks = [f" ({digest(s)})" if labels.count(label) > 1 else ""
             for s, label in zip(every, labels, strict=True)]  # fmt: skip
    return [(long + mark, short + mark) for (long, short), mark in zip(names, marks, strict=True)]


def _differing(many: Sequence[Mapping[str, Any]]) -> list[str]:
    full = [complete_settings(settings) for settings in many]
    keys = sorted(set().union(*many))
    return [key for key in keys if len({repr(settings.get(key)) for settings in full}) > 1]


def _order(settings: Mapping[str, Any], runs: Sequence[Run]) -> tuple[Any, ...]:
    values = [(k, (0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)))
              for k, v in sorted(settings.items())]  # fmt: skip
    variant = max(run.variant for run in runs)
    method = settings["method"]
    return ([*METHODS, method].index(method), variant, values)  # unknown methods come last


def _brief(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
