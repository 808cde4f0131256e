"""Group runs of the same settings and different seeds; mean and standard error over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

from common.errors import ConfigError, MHpFedHNError, RunError, listing
from experiments.report.runs import Run, find_run
from experiments.report.settings import complete_settings, digest, essential
from experiments.sweep.cells import process_of, read_note
from server_app.output.figures import METHODS

DEEPEST = 4
NAMED_KEYS = 3
RUN_FILES = ("summary.json", "metrics.jsonl")


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
class Member:
    """One run of a group: how it ended, and why it does not count, where it does not."""

    run: Run
    note: Mapping[str, Any]
    left_out: str = ""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.run.config.get("seed", self.run.summary.get("seed", 0)))

    @cached_property
    def status(self) -> str:
        """How the run ended; "running" where a sweep's process is still at work on it."""
        status = str(self.run.summary.get("status", "unknown"))
        running = status != "completed" and process_of(self.note) is not None
        return "running" if running else status

    @property
    def rounds(self) -> int:
        """Rounds that are on disk."""
        return int(self.run.rows[-1]["round"]) if self.run.rows else 0

    @property
    def asked_rounds(self) -> int:
        """Rounds that the run was to have."""
        return int(self.run.config.get("rounds", self.rounds))

    def last(self, key: str) -> float | None:
        """Return a value of the last evaluated round."""
        return _number((self.run.summary.get("last") or {}).get(key))

    def best(self, key: str) -> float | None:
        """Return a value of the round with the best micro accuracy."""
        return _number((self.run.summary.get("best") or {}).get(key))

    def total(self, key: str) -> float:
        """Add a column of all rounds up; a resumed run's summary times its last part alone."""
        return sum(_number(row.get(key)) or 0.0 for row in self.run.rows)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    `settings` are what decides the result and is not the default. Only `counted` members enter
    means: completed, one for each seed.
    """

    label: str
    short: str
    method: str
    settings: Mapping[str, Any]
    members: tuple[Member, ...]

    @property
    def counted(self) -> tuple[Member, ...]:
        """The members that enter means."""
        return tuple(member for member in self.members if not member.left_out)

    @property
    def left_out(self) -> tuple[Member, ...]:
        """The members that do not: unfinished, failed, or a seed that is there twice."""
        return tuple(member for member in self.members if member.left_out)

    def stat(self, value: Callable[[Member], float | None]) -> Stat | None:
        """Return mean and standard error of a value over the seeds."""
        return Stat.of(value(member) for member in self.counted)

    @property
    def key(self) -> str:
        """A short name of the settings."""
        return digest(dict(self.settings))


@dataclass(frozen=True)
class Study:
    """Everything that was found: groups in the order of their methods, and unreadable folders."""

    groups: tuple[Group, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def members(self) -> list[Member]:
        """All runs."""
        return [member for group in self.groups for member in group.members]


def load_study(folder: Path) -> Study:
    """Load every run below a folder (or the one that it is).

    Raises
    ------
    RunError
        There is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Give the folder that holds the runs.")
    folders, unreadable, runs = _run_folders(folder, DEEPEST), [], []
    for path in folders:
        try:
            runs.append(Run.load(path))
        except MHpFedHNError as error:
            unreadable.append(str(error))
    if not folders:
        raise RunError(
            f"no run below {folder}: no folder there holds summary.json or metrics.jsonl. A sweep "
            "writes its runs below its output-dir."
        )
    return Study(group_runs(runs), tuple(unreadable))


def load_named(names: Sequence[str]) -> Study:
    """Load runs by their folders or names; a folder of runs stands for all of them."""
    runs: list[Run] = []
    for name in names:
        path = Path(name).expanduser()
        many = path.is_dir() and not any((path / file).is_file() for file in RUN_FILES)
        runs += [Run.load(p) for p in _run_folders(path.resolve(), DEEPEST)] if many else []
        if not many:
            runs.append(find_run(name))
    if not runs:
        raise RunError(f"no run in {listing(names)}.")
    unique = {run.folder: run for run in runs}
    return Study(group_runs(list(unique.values())))


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Group runs that differ in their seed alone; name the groups by what tells them apart."""
    found: dict[str, tuple[dict[str, Any], list[Member]]] = {}
    for run in runs:
        settings = essential(run.config)
        settings.pop("seed", None)
        method = complete_settings(run.config)["method"]
        settings["method"] = run.summary.get("method", method) if not run.config else method
        member = Member(run, read_note(run.folder))
        found.setdefault(digest(settings), (settings, []))[1].append(member)
    drafts = sorted(found.values(), key=lambda item: _order(item[0], item[1]))
    names = _names([(s, members) for s, members in drafts])
    return tuple(
        Group(label, short, str(settings["method"]), settings, _judge(members))
        for (settings, members), (label, short) in zip(drafts, names, strict=True)
    )


def _judge(members: Sequence[Member]) -> tuple[Member, ...]:
    """Say of each member whether it counts: completed, and the newest one of its seed."""
    newest_first = sorted(members, key=lambda m: changed_at(m.run), reverse=True)
    seen: set[int] = set()
    judged = []
    for member in newest_first:
        reason = ""
        if member.status != "completed":
            reason = f"{member.status} after round {member.rounds} of {member.asked_rounds}"
        elif member.seed in seen:
            reason = f"an older run of seed {member.seed}"
        else:
            seen.add(member.seed)
        judged.append(Member(member.run, member.note, reason))
    return tuple(sorted(judged, key=lambda m: (m.seed, bool(m.left_out), m.run.name)))


def _names(drafts: Sequence[tuple[Mapping[str, Any], Sequence[Member]]]) -> list[tuple[str, str]]:
    """Return (label, short label) of each group: the variant or method, and what differs."""
    folders = [members[0].run.folder.name for _, members in drafts if len(members) == 1]
    crowded = len(_differing([settings for settings, _ in drafts])) > NAMED_KEYS
    from_sweep = any(member.note.get("variant") for _, members in drafts for member in members)
    if crowded and not from_sweep and len(set(folders)) == len(drafts):
        return [(name, name) for name in folders]  # more differs than a label can hold
    bases = [_base(settings, members) for settings, members in drafts]
    names = []
    for (settings, _), base in zip(drafts, bases, strict=True):
        rivals = [s for (s, _), b in zip(drafts, bases, strict=True) if b == base]
        keys = [k for k in _differing(rivals) if k != "method" or len(set(bases)) == 1]
        full = complete_settings(settings)
        shown = [f"{key} {_brief(full.get(key))}" for key in keys[:NAMED_KEYS]]
        values = [_brief(full.get(key)) for key in keys[:NAMED_KEYS]]
        brief = ["/".join(values)] if values else []
        many = len(set(bases)) > 1 or not brief  # with one method alone its name says nothing
        names.append((", ".join([base, *shown]), " ".join([base, *brief] if many else brief)))
    for place, (label, short) in enumerate(names):
        if sum(label == other for other, _ in names) > 1:
            mark = digest(dict(drafts[place][0]))
            names[place] = (f"{label} ({mark})", f"{short} ({mark})")
    return names


def _base(settings: Mapping[str, Any], members: Sequence[Member]) -> str:
    method = str(settings["method"])
    variants = {str(member.note.get("variant", "")) for member in members} - {""}
    return variants.pop() if len(variants) == 1 else METHODS.get(method, method)


def _differing(many: Sequence[Mapping[str, Any]]) -> list[str]:
    full = [complete_settings(settings) for settings in many]
    keys = sorted(set().union(*many))
    return [key for key in keys if len({repr(settings.get(key)) for settings in full}) > 1]


def _order(settings: Mapping[str, Any], members: Sequence[Member]) -> tuple[Any, ...]:
    method = str(settings["method"])
    known = list(METHODS)
    place = known.index(method) if method in known else len(known)
    variant = max((str(m.note.get("variant", "")) for m in members), default="")
    values = [(k, (0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)))
              for k, v in sorted(settings.items())]  # fmt: skip
    return (place, method, variant, values)


def _run_folders(folder: Path, depth: int) -> list[Path]:
    if any((folder / name).is_file() for name in RUN_FILES):
        return [folder]
    if depth == 0:
        return []
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [found for path in inner for found in _run_folders(path, depth - 1)]


def changed_at(run: Run) -> float:
    """Return when a run last wrote, in seconds since the epoch; 0 where nothing is there."""
    return max((p.stat().st_mtime for name in RUN_FILES if (p := run.folder / name).is_file()),
               default=0.0)  # fmt: skip


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if usable else None


def _brief(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else text[:23] + "…"
