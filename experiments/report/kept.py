"""The picture of docs/parallel.md, drawn from the curves that are kept in docs/parallel-runs.csv.

`python -m experiments.report.kept` writes docs/parallel.png in two seconds; the runs themselves
take hours. A line's name, what it is called in the CSV (each seed a name), and its method.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import RunError, unknown_name
from experiments.report.charts import Line
from experiments.report.curves import Curve, average
from experiments.report.looks import Look, looks_for
from experiments.report.picture import draw_line, name_ends
from server_app.output.figures import Layout, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[2] / "docs"
Runs = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Kept:
    """One line: its name in the picture, the method whose look it has, its runs in the CSV."""

    name: str
    method: str
    runs: tuple[str, ...]


def seeds_of(run: str) -> tuple[str, ...]:
    """Return the names that seeds 1 to 3 of a run have in the CSV."""
    return tuple(f"{run} seed={seed}" for seed in (1, 2, 3))


PANELS: Mapping[str, tuple[Kept, ...]] = {
    "CIFAR-100, 10 classes a client": (
        Kept("MH-pFedHNGD, ten", "mh-pfedhn-gd", seeds_of("cifar100-gd")),
        Kept("ten at a time", "mh-pfedhn", seeds_of("cifar100-cohort10")),
        Kept("all, in tens", "async", ("cifar100-async seed=1",)),
        Kept("all at once", "parallel", ("cifar100-parallel seed=1",)),
        Kept("one by one, published", "sequential", ("cifar100-sequential seed=1",)),
        Kept("Local", "local", ("cifar100-cohort10 method=local seed=1",)),
    ),
    "CIFAR-10, 2 classes a client": (
        Kept("MH-pFedHNGD, ten", "mh-pfedhn-gd", ("cifar10-gd seed=1",)),
        Kept("ten at a time", "mh-pfedhn", ("cifar10-cohort10 seed=1",)),
        Kept("all, in tens", "async", ("cifar10-async seed=1",)),
        Kept("all at once", "parallel", ("cifar10-parallel seed=1",)),
    ),
}


def read_runs(path: Path) -> Runs:
    """Read {run: {round: micro accuracy}}.

    Raises
    ------
    RunError
        The file cannot be read.
    """
    found: dict[str, dict[int, float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                points = found.setdefault(row["run"], {})
                if row["accuracy_micro"]:  # a round without a test has none
                    points[int(row["round"])] = float(row["accuracy_micro"])
    except (OSError, KeyError, ValueError) as error:
        raise RunError(f"cannot read curves from {path}: {error!r}.") from error
    return found


def curve_of(kept: Kept, runs: Runs) -> Curve:
    """Average the runs of one line; raise RunError where the CSV lacks one."""
    for run in kept.runs:
        if run not in runs:
            raise RunError(unknown_name("run", run, runs))
    points = [{n: (float(n), y) for n, y in runs[run].items()} for run in kept.runs]
    curve = average(points)
    if curve is None:
        raise RunError(f"{', '.join(kept.runs)} have no round in common.")
    return curve


def draw_kept(runs: Runs, target: Path) -> None:
    """Draw both data sets, accuracy by round."""
    layout = Layout(
        "Fifty clients, one CNN each: how many train at the same time",
        "micro test accuracy by round, seed 1; ten at a time on CIFAR-100: mean of seeds 1 to 3. "
        "One by one has the published rates, a quarter of the others'",
        (13.0, 5.4),
        "ab",
        (1.0, 1.0),
    )
    names = dict.fromkeys((kept.name, kept.method) for panel in PANELS.values() for kept in panel)
    looks = looks_for(list(names))
    with picture(layout, target) as figure:
        for axes, (title, panel) in zip(figure.axes, PANELS.items(), strict=True):
            axes.set(title=title, xlabel="round", ylabel="test accuracy (%)")
            _draw_panel(axes, [(kept, curve_of(kept, runs)) for kept in panel], looks)


def _draw_panel(
    axes: Axes, curves: Sequence[tuple[Kept, Curve]], looks: Mapping[str, Look]
) -> None:
    lines = [Line(curve, looks[kept.name], kept.name, kept.name) for kept, curve in curves]
    for line in lines:
        draw_line(axes, line)
    axes.set_xlim(0, max(line.end for line in lines))
    axes.set_ylim(bottom=0)
    name_ends(axes, lines)


def main() -> None:
    """Draw docs/parallel.png."""
    draw_kept(read_runs(DOCS / "parallel-runs.csv"), DOCS / "parallel.png")
    print(f"wrote {DOCS / 'parallel.png'}")


if __name__ == "__main__":
    main()
