"""The style of every picture, and a run's picture of what the server's steps did.

matplotlib is imported only when something is drawn, and never through pyplot: no global figure, no
display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import printable, read_json, read_rows, replace_file
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
PURPLE = "#8a4fa8"
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
    "text.parse_math": False,  # names are participants' own: "$\\frac$" is text
    "savefig.dpi": 150,
}


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
        draw_column(
            moves, rows, "rms_theta_change", color=BLUE, label="change of theta by a server step"
        )
        draw_column(moves, rows, "rms_delta", color=GREEN, label="delta of a client")
        rate.set(title="Effective rate", ylabel="change of theta / delta")
        draw_column(rate, rows, "effective_rate", color=ORANGE)
        agreement.set(title="Coherence of the deltas", ylabel="|mean|² / mean of |delta|²")
        draw_column(agreement, rows, "coherence", color=BLUE, label="measured")
        x, counts = column(rows, "num_updates")
        chance = [1 / max(1.0, count) for count in counts]
        label = "unrelated deltas (1 / updates)"
        agreement.plot(x, chance, color=MUTED, linestyle="--", label=label)
        age.set(title="Staleness", ylabel="server steps since dispatch")
        draw_column(age, rows, "mean_staleness", color=MUTED)
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
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", facecolor="white")
        replace_file(target, drawn.getvalue())


def folder_title(folder: Path) -> str:
    """Name a run by its method, data and clients, e.g. "MH-pFedHN · cifar100 · 50 clients"."""
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    method = str(config.get("method", summary.get("method", folder.name)))
    label = METHODS[method].label if method in METHODS else method
    parts = [label, str(config.get("dataset", ""))]
    if clients := summary.get("num_clients"):
        parts.append(f"{clients} clients")
    return printable(" · ".join(part for part in parts if part))


def draw_column(
    axes: Axes, rows: Sequence[Row], key: str, *, scale: float = 1.0, **look: Any
) -> None:
    """Draw a column of metrics.jsonl by round, where there is any; `look` as matplotlib's plot."""
    x, y = column(rows, key)
    if x:
        axes.plot(x, [scale * value for value in y], **markers(x), **look)


def markers(x: Sequence[int]) -> dict[str, Any]:
    """Return how points are marked."""
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


def spread(wanted: Sequence[float], *, gap: float, high: float) -> list[float]:
    """Move label positions, given downwards, apart until neighbours are `gap` away, in 0 to `high`.

    >>> spread([99, 98, 50], gap=10, high=100), spread([3, 2, 1], gap=10, high=100)
    ([99, 89, 50], [20, 10, 0])
    """
    placed: list[float] = []
    for place in wanted:
        placed.append(min(place, placed[-1] - gap if placed else high))
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], placed[i + 1] + gap if i + 1 < len(placed) else 0)
    return placed
