"""The picture of docs/parallel.md, drawn from the curves that are kept in docs/parallel-runs.csv.

`python -m experiments.report.kept` writes docs/parallel.png in two seconds; the runs themselves
take hours.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import RunError
from experiments.report.figures import draw_line, name_ends
from experiments.report.lines import Line, Points, average
from experiments.report.looks import Look, looks_for
from server_app.output.figures import Layout, picture

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Kept:
    """One line: its name in the picture, the method whose look it has, its run and seeds."""

    name: str
    method: str
    run: str
    seeds: tuple[int, ...] = (1,)


PANELS: Mapping[str, tuple[Kept, ...]] = {
    "CIFAR-100, 10 classes a client": (
        Kept("MH-pFedHNGD, ten", "mh-pfedhn-gd", "cifar100-gd", (1, 2, 3)),
        Kept("ten at a time", "mh-pfedhn", "cifar100-cohort10", (1, 2, 3)),
        Kept("all, in tens", "async", "cifar100-async"),
        Kept("all at once", "parallel", "cifar100-parallel"),
        Kept("one by one, published", "sequential", "cifar100-sequential"),
        Kept("Local", "local", "cifar100-cohort10 method=local"),
    ),
    "CIFAR-10, 2 classes a client": (
        Kept("MH-pFedHNGD, ten", "mh-pfedhn-gd", "cifar10-gd"),
        Kept("ten at a time", "mh-pfedhn", "cifar10-cohort10"),
        Kept("all, in tens", "async", "cifar10-async"),
        Kept("all at once", "parallel", "cifar10-parallel"),
    ),
}
LAYOUT = Layout(
    "Fifty clients, one CNN each: how many train at the same time",
    "micro test accuracy by round, seed 1; ten at a time on CIFAR-100: mean of seeds 1 to 3. "
    "One by one has the published rates, a quarter of the others'",
    (13.0, 5.4), "ab", (1.0, 1.0),
)  # fmt: skip


def read_runs(path: Path) -> dict[str, Points]:
    """Read {run: {round: (round, micro accuracy)}}; a round without a test is left out."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["accuracy_micro"]:
                place = float(row["round"]), float(row["accuracy_micro"])
                found.setdefault(row["run"], {})[int(row["round"])] = place
    return dict(found)


def line_of(kept: Kept, runs: Mapping[str, Points], look: Look) -> Line:
    """Average the seeds of one line over the rounds that all of them have."""
    curve = average([runs[f"{kept.run} seed={seed}"] for seed in kept.seeds])
    if curve is None:
        raise RunError(f"the seeds of {kept.run} have no round in common.")
    return Line(curve, look, kept.name, kept.name)


def draw_kept(runs: Mapping[str, Points], target: Path) -> None:
    """Draw both data sets, accuracy by round."""
    names = dict.fromkeys((kept.name, kept.method) for panel in PANELS.values() for kept in panel)
    looks = looks_for([*names])
    with picture(LAYOUT, target) as figure:
        for axes, (title, panel) in zip(figure.axes, PANELS.items(), strict=True):
            lines = [line_of(kept, runs, looks[kept.name]) for kept in panel]
            for line in lines:
                draw_line(axes, line)
            axes.set(title=title, xlabel="round", ylabel="test accuracy (%)")
            axes.set(xlim=(0, max(line.end for line in lines)), ylim=(0, None))
            name_ends(axes, lines)


if __name__ == "__main__":
    draw_kept(read_runs(DOCS / "parallel-runs.csv"), DOCS / "parallel.png")
    print(f"wrote {DOCS / 'parallel.png'}")
