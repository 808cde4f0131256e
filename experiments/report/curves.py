"""Accuracy of a group against rounds, bytes or seconds: mean and standard error over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Literal

from experiments.report.groups import Group, Member, Stat

Axis = Literal["round", "bytes", "bytes-up", "seconds"]
TRAFFIC: Mapping[str, Axis] = {"both": "bytes", "up": "bytes-up"}
"""What `compare --bytes` draws by; `uplink-top-k` shortens what goes up alone."""
AXES: tuple[Axis, ...] = ("round", "bytes", "seconds")
"""Those of the page."""


@dataclass(frozen=True)
class Curve:
    """Points of one group, ascending in x; `error` has None where there is one seed.

    x: rounds, bytes of all clients in both directions or up alone, or seconds; y: a fraction.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float | None, ...]

    @property
    def has_band(self) -> bool:
        """Whether there is a standard error to draw."""
        return any(e for e in self.error if e is not None)


def mean_curve(group: Group, axis: Axis, *, key: str = "accuracy_micro") -> Curve | None:
    """Average a group's completed runs, round by round; None where nothing was evaluated.

    Only rounds that every seed has evaluated are used. Bytes and seconds are the means over the
    seeds of what was spent up to that round.
    """
    return average([_points(member, axis, key) for member in group.counted])


def single_curve(member: Member, axis: Axis, *, key: str = "accuracy_micro") -> Curve | None:
    """Return the curve of one run, completed or not."""
    return average([_points(member, axis, key)])


def _points(member: Member, axis: Axis, key: str) -> dict[int, tuple[float, float]]:
    """Return {round: (x, y)} of the rounds that were evaluated."""
    rows = member.run.rows
    if axis == "round":
        spent = [float(row["round"]) for row in rows]
    elif axis == "bytes-up":
        spent = [*accumulate(float(row.get("bytes_up", 0)) for row in rows)]
    elif axis == "bytes":
        spent = [*accumulate(float(r.get("bytes_up", 0) + r.get("bytes_down", 0)) for r in rows)]
    else:
        spent = [*accumulate(float(row.get("seconds_round", 0.0)) for row in rows)]
    return {
        int(row["round"]): (x, float(row[key]))
        for row, x in zip(rows, spent, strict=True)
        if row.get(key) is not None
    }


def average(runs: Sequence[Mapping[int, tuple[float, float]]]) -> Curve | None:
    """Average {round: (x, y)} of several seeds over the rounds that all have; None without any."""
    if not runs:
        return None
    shared = sorted(set(runs[0]).intersection(*runs[1:]))
    if not shared:
        return None
    stats = [Stat.of(run[number][1] for run in runs) for number in shared]
    kept = [(n, stat) for n, stat in zip(shared, stats, strict=True) if stat is not None]
    return Curve(
        tuple(fmean(run[number][0] for run in runs) for number, _ in kept),
        tuple(stat.mean for _, stat in kept),
        tuple(stat.error for _, stat in kept),
    )
