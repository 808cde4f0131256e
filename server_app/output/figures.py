"""Draw a run folder's pictures: accuracy, loss and traffic by round, and what the steps did.

Needs the folder alone (metrics.jsonl, and config.json and summary.json for the title), so that the
server draws when a run ends and the command line draws again later. matplotlib is imported only
when something is drawn, and never through pyplot: no global figure, no display.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from common.errors import RunError
from common.files import read_json, read_rows
from common.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

INK = "#22272e"
MUTED = "#6b7480"
GRID = "#e3e6ea"
BLUE = "#1f6fb4"
ORANGE = "#d9641e"
GREEN = "#2a8c6a"
LEAST_STEPS = 4
"""Rounds of which the steps are drawn: a curve of fewer points says nothing."""
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 9,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Reference:
    """Somebody else's curve for the same experiment: rounds, accuracy and loss, and its source."""

    source: str
    rounds: tuple[int, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `{"source", "columns": ["round", "loss", "accuracy"], "rows": [[...], ...]}`.

        Raises RunError where the file cannot be read or has another form.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = list(content["columns"])
            where = [names.index(name) for name in ("round", "accuracy", "loss")]
            rows = [[float(row[i]) for i in where] for row in content["rows"]]
            return cls(
                source=str(content.get("source", path.stem)),
                rounds=tuple(int(row[0]) for row in rows),
                accuracy=tuple(row[1] for row in rows),
                loss=tuple(row[2] for row in rows),
            )
        except OSError as error:
            raise RunError(f"cannot read the reference {path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(
                f"{path} is not a reference curve. Expected JSON with the keys source, columns "
                f'(["round", "loss", "accuracy"]) and rows (one list each): {error!r}.'
            ) from error


def draw_curves(
    folder: Path, *, reference: Reference | None = None, target: Path | None = None
) -> Path:
    """Draw accuracy, loss and traffic by round, a reference's curves in the same panels.

    Takes a run folder; rows without an evaluation leave gaps in no curve. Writes `curves.png` there
    unless another PNG is named, and returns its path.
    """
    rows = read_rows(folder / "metrics.jsonl")
    target = target or folder / "curves.png"
    layout = Layout(folder_title(folder), _outcome(rows), (11.0, 5.8), "ab;ac", (1.75, 1.0))
    with picture(layout, target) as figure:
        accuracy, loss, traffic = figure.axes
        _draw_accuracy(accuracy, rows, reference)
        _draw_loss(loss, rows, reference)
        _draw_traffic(traffic, rows)
    return target


def draw_steps(folder: Path, *, target: Path | None = None) -> Path | None:
    """Draw the diagnostics of the server's steps by round, means over the steps of a round.

    Takes a run folder; writes `steps.png` there unless another PNG is named. Returns its path, or
    None where the method takes no such steps (baselines), or in fewer than `LEAST_STEPS` rounds.
    """
    rows = read_rows(folder / "metrics.jsonl")
    if len(column(rows, "rms_theta_change")[0]) < LEAST_STEPS:
        return None
    target = target or folder / "steps.png"
    subtitle = "the server's steps, means over the steps of a round"
    layout = Layout(folder_title(folder), subtitle, (11.0, 5.8), "ab;cd", (1.0, 1.0))
    with picture(layout, target) as figure:
        moves, rate, agreement, age = figure.axes
        moves.set(title="Root mean square by parameter", ylabel="rms (log scale)", yscale="log")
        _line(moves, rows, "rms_theta_change", color=BLUE, label="change of theta by a server step")
        _line(moves, rows, "rms_delta", color=GREEN, label="delta of a client")
        rate.set(title="Effective rate", ylabel="change of theta / delta")
        _line(rate, rows, "effective_rate", color=ORANGE)
        agreement.set(title="Coherence of the deltas", ylabel="|mean|² / mean of |delta|²")
        _line(agreement, rows, "coherence", color=BLUE, label="measured")
        x, counts = column(rows, "num_updates")
        chance = [1 / max(1.0, count) for count in counts]
        label = "unrelated deltas (1 / updates)"
        agreement.plot(x, chance, color=MUTED, linestyle="--", label=label)
        age.set(title="Staleness", ylabel="server steps since dispatch")
        _line(age, rows, "mean_staleness", color=MUTED)
        for axes in figure.axes:
            finish_axes(axes, rows, legend=axes in (moves, agreement))
        for axes in (agreement, age):
            axes.set_xlabel("round")
        top = max([0.05, *column(rows, "coherence")[1], *chance])
        agreement.set_ylim(0, min(1.05, 1.15 * top))
        age.set_ylim(0, 1.1 * max([1.0, *column(rows, "mean_staleness")[1]]))
    return target


def column(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Return the rounds that have a finite value under `key`, and those values."""
    pairs = [
        (int(row["round"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


@dataclass(frozen=True)
class Layout:
    """What a picture says above its panels, its size, and how the panels are arranged.

    `size` is in inches; `grid` is matplotlib's mosaic form, rows separated by ";"; `widths` are
    relative, one for each column.
    """

    title: str
    subtitle: str
    size: tuple[float, float]
    grid: str
    widths: tuple[float, ...]


@contextmanager
def picture(layout: Layout, target: Path) -> Iterator[Figure]:
    """Give a figure in the project's style to draw into, and write it as PNG at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = layout.size
    below_title = (0, 0, 1, 1 - 0.66 / height)
    with mpl.rc_context(STYLE):
        engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, rect=below_title)
        figure = Figure(figsize=(width, height), layout=engine)
        figure.subplot_mosaic(layout.grid, width_ratios=layout.widths)
        left = 0.14 / width
        figure.text(left, 1 - 0.14 / height, layout.title, size=14, weight="bold", va="top")
        figure.text(left, 1 - 0.44 / height, layout.subtitle, va="top", color=MUTED)
        yield figure
        figure.savefig(target, format="png", facecolor="white")


def folder_title(folder: Path) -> str:
    """Name a run by its method, data and clients, e.g. "MH-pFedHN · cifar100 · 50 clients"."""
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    method = str(config.get("method", summary.get("method", folder.name)))
    label = METHODS[method].label if method in METHODS else method
    parts = [label, str(config.get("dataset", ""))]
    if clients := summary.get("num_clients"):
        parts.append(f"{clients} clients")
    return " · ".join(part for part in parts if part)


def _outcome(rows: Sequence[Row]) -> str:
    rounds, values = column(rows, "accuracy_micro")
    if not values:
        return f"{len(rows)} rounds, no evaluation yet"
    best = max(range(len(values)), key=values.__getitem__)
    return (
        f"micro accuracy {100 * values[-1]:.1f} % after round {rounds[-1]}, "
        f"best {100 * values[best]:.1f} % in round {rounds[best]}"
    )


def _draw_accuracy(axes: Axes, rows: Sequence[Row], reference: Reference | None) -> None:
    axes.set(title="Test accuracy", xlabel="round", ylabel="accuracy (%)")
    _line(axes, rows, "accuracy_micro", color=BLUE, label="all examples (micro)", scale=100)
    _line(axes, rows, "accuracy_macro", color=GREEN, label="mean of clients (macro)", scale=100)
    x, macro = column(rows, "accuracy_macro")
    worst_x, worst = column(rows, "accuracy_worst10")
    if x and x == worst_x:
        low, high = [100 * v for v in worst], [100 * v for v in macro]
        label = "from the worst 10 % to the mean"
        axes.fill_between(x, low, high, color=GREEN, alpha=0.12, linewidth=0, label=label)
        axes.plot(x, low, color=GREEN, alpha=0.35, linewidth=1.0)
    if reference:
        _dashed(axes, rows, reference, [100 * v for v in reference.accuracy])
    finish_axes(axes, rows)
    axes.set_ylim(bottom=0)


def _draw_loss(axes: Axes, rows: Sequence[Row], reference: Reference | None) -> None:
    axes.set(title="Loss", ylabel="cross-entropy (nats)")
    _line(axes, rows, "test_loss", color=BLUE, label="test")
    _line(axes, rows, "train_loss", color=MUTED, label="local training")
    if reference:
        _dashed(axes, rows, reference, reference.loss)
    finish_axes(axes, rows)


def _draw_traffic(axes: Axes, rows: Sequence[Row]) -> None:
    down, up = ([*accumulate(column(rows, key)[1])] for key in ("bytes_down", "bytes_up"))
    unit, size = ("GB", 1e9) if max([0.0, *down, *up]) >= 2e9 else ("MB", 1e6)
    axes.set(title="Traffic so far", xlabel="round", ylabel=f"total ({unit})")
    for key, totals, color, label in (
        ("bytes_down", down, BLUE, "to clients"),
        ("bytes_up", up, GREEN, "to the server"),
    ):
        if x := column(rows, key)[0]:
            axes.plot(x, [t / size for t in totals], color=color, label=label, **_mark(x))
    finish_axes(axes, rows)
    axes.set_ylim(bottom=0)


def _line(
    axes: Axes, rows: Sequence[Row], key: str, *, color: str, label: str = "", scale: float = 1.0
) -> None:
    x, y = column(rows, key)
    if x:
        axes.plot(x, [scale * value for value in y], color=color, label=label, **_mark(x))


def _dashed(axes: Axes, rows: Sequence[Row], reference: Reference, values: Sequence[float]) -> None:
    last = max((int(row["round"]) for row in rows), default=reference.rounds[-1])
    points = [(x, y) for x, y in zip(reference.rounds, values, strict=True) if x <= last]
    axes.plot(*zip(*points, strict=True), color=ORANGE, linestyle="--", label="reference")


def _mark(x: Sequence[int]) -> dict[str, Any]:
    # A single round is a point, not an invisible line; many points would clutter.
    return {"marker": "o", "markersize": 3.5} if len(x) <= 15 else {}


def finish_axes(axes: Axes, rows: Sequence[Row], *, legend: bool = True) -> None:
    """Set the axis of rounds, and the legend, or say that there is nothing to see."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    last = max((int(row["round"]) for row in rows), default=1)
    axes.set_xlim(0, max(2.0, last * 1.02))
    if not legend:
        return
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", color=MUTED)
