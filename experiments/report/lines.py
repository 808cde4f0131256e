"""Accuracy of a group against rounds, bytes or seconds: mean and standard error over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Literal

from experiments.report.groups import Stat, Study
from experiments.report.looks import Look
from experiments.report.runs import Run

Axis = Literal["round", "bytes", "bytes-up", "seconds"]
TRAFFIC: Mapping[str, Axis] = {"both": "bytes", "up": "bytes-up"}
"""What `compare --bytes` draws by; `uplink-top-k` shortens what goes up alone."""
SPENT: Mapping[Axis, tuple[str, ...]] = {
    "bytes": ("bytes_up", "bytes_down"), "bytes-up": ("bytes_up",), "seconds": ("seconds_round",),
}  # fmt: skip
"""The columns that an axis adds up."""

Points = Mapping[int, tuple[float, float]]
"""{round: (x, y)}."""


@dataclass(frozen=True)
class Curve:
    """Points, ascending in x, with standard errors: 0 where there is one seed.

    x: rounds, bytes of all clients in both directions or up alone, or seconds; y: a fraction.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """A curve with its look and names; `open` marks a run that never completed."""

    curve: Curve
    look: Look
    label: str
    short: str
    open: bool = False

    @property
    def end(self) -> float:
        """Where it ends in x."""
        return self.curve.x[-1]

    @property
    def last(self) -> float:
        """Where it ends in y, in per cent."""
        return 100 * self.curve.y[-1]


def lines_of(study: Study, looks: Mapping[str, Look], axis: Axis) -> list[Line]:
    """Return a line for each group's mean, and one for every run that has not completed."""
    lines: list[Line] = []
    for group in study.groups:
        look = looks[group.key]
        if curve := average([points(run, axis) for run in group.counted]):
            seeds = f"{len(group.counted)} seed{'s' if len(group.counted) > 1 else ''}"
            lines.append(Line(curve, look, f"{group.label}: {seeds}", group.short))
        for run in group.left_out:
            if run.status != "completed" and (curve := average([points(run, axis)])):
                label = f"{group.label}, seed {run.seed}: {run.left_out}"
                lines.append(Line(curve, look, label, f"{group.short} †", open=True))
    return lines


def points(run: Run, axis: Axis) -> Points:
    """Return the rounds of a run that were evaluated, completed or not."""
    if axis == "round":
        spent = [float(row["round"]) for row in run.rows]
    else:
        costs = (sum(float(row.get(name, 0)) for name in SPENT[axis]) for row in run.rows)
        spent = [*accumulate(costs)]
    return {
        int(row["round"]): (x, float(row["accuracy_micro"]))
        for row, x in zip(run.rows, spent, strict=True)
        if row.get("accuracy_micro") is not None
    }


def average(runs: Sequence[Points]) -> Curve | None:
    """Average several seeds, over the rounds that all have evaluated; None where there is none.

    Bytes and seconds are the means over the seeds of what was spent up to that round.
    """
    shared = sorted(set(runs[0]).intersection(*runs[1:])) if runs else []
    stats = {number: Stat.of(run[number][1] for run in runs) for number in shared}
    kept = {number: stat for number, stat in stats.items() if stat is not None}
    if not kept:
        return None
    return Curve(
        tuple(fmean(run[number][0] for run in runs) for number in kept),
        tuple(stat.mean for stat in kept.values()),
        tuple(stat.error or 0.0 for stat in kept.values()),
    )
