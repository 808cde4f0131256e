"""The picture of a run that needs to know architectures: every client, and the spread.

A client is a bar, or where it was measured the way from what it reaches alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.report.looks import family_looks
from experiments.report.runs import Run
from server_app.output.figures import INK, MUTED, Layout, folder_title, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # drawing takes a second to import

MOST_NUMBERS = 25

GAINS: Any = {"linewidth": 3, "alpha": 0.55, "solid_capstyle": "butt"}
LOSES = {**GAINS, "linestyle": (0, (1, 1))}

Families = Mapping[str, Mapping[int, float]]
"""{architecture: {place of a client: its accuracy in per cent}}."""


def draw_clients(run: Run, target: Path | None = None) -> Path:
    """Draw every client's test accuracy, coloured by architecture, and each architecture's spread.

    Returns the path of the picture; `clients.png` in the run's folder when no target is given.
    """
    target = target or run.folder / "clients.png"
    names, families = run.families(), dict[str, dict[int, float]]()
    alone = {i: 100 * c.alone for i, c in enumerate(run.clients) if c.alone is not None}
    for place, client in enumerate(run.clients):
        families.setdefault(names[client.client_id], {})[place] = 100 * client.accuracy
    colours = {name: look.light for name, look in family_looks([*families]).items()}
    subtitle = "no client was evaluated"
    if run.clients:
        worst, best = (pick(run.clients, key=lambda c: c.accuracy) for pick in (min, max))
        subtitle = (
            f"newest evaluation; from {100 * worst.accuracy:.1f} % (client {worst.client_id}) "
            f"to {100 * best.accuracy:.1f} % (client {best.client_id})"
        )
    layout = Layout(folder_title(run.folder), subtitle, (11.0, 4.9), "ab", (2.4, 1.0))
    with picture(layout, target) as figure:
        bars, spread = figure.axes
        ids = [client.client_id for client in run.clients]
        (partial(_draw_ways, alone=alone) if alone else _draw_bars)(bars, families, colours, ids)
        _draw_spread(spread, families, colours)
    return target


def _draw_bars(axes: Axes, families: Families, colours: Mapping[str, str], ids: list[str]) -> None:
    for name, own in families.items():
        axes.bar([*own], [*own.values()], width=0.82, color=colours[name], label=name)
    _finish(axes, families, ids)


def _draw_ways(
    axes: Axes,
    families: Families,
    colours: Mapping[str, str],
    ids: list[str],
    *,
    alone: Mapping[int, float],
) -> None:
    """Draw for each client the way from what it reaches alone to what it reaches here."""
    big, small = (9, 7) if len(ids) <= MOST_NUMBERS else (5, 4)
    for name, reached in families.items():
        for place, value in reached.items():
            before, colour = alone.get(place, value), colours[name]
            style = LOSES if value < before else GAINS
            axes.plot([place] * 2, [before, value], color=colour, **style)
            axes.plot(place, before, "o", markersize=small, markerfacecolor="white",
                      markeredgecolor=colour, markeredgewidth=1.6, clip_on=False)  # fmt: skip
            axes.plot(place, value, "o", markersize=big, color=colour, clip_on=False)
    marks = [axes.plot([], [], "o", color=MUTED, markerfacecolor=face)[0] for face in ("w", MUTED)]
    marks += axes.plot([], [], color=MUTED, **LOSES)
    words = ["alone", "in the federation", "loses"]
    axes.legend(marks, words, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    _finish(axes, families, ids)


def _finish(axes: Axes, families: Families, ids: list[str]) -> None:
    axes.set(title="Test accuracy of each client", ylabel="accuracy (%)")
    if ids:
        mean = fmean(value for own in families.values() for value in own.values())
        axes.axhline(mean, color=INK, linewidth=1.0, linestyle=(0, (5, 3)))
        axes.annotate(
            f"mean\n{mean:.1f} %", (1.0, mean), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    step = max(1, -(-len(ids) // MOST_NUMBERS))
    axes.set_xticks(range(0, len(ids), step), ids[::step])
    axes.set(xlabel="client", xlim=(-0.8, max(len(ids), 1) - 0.2), ylim=(0, 100))
    axes.grid(visible=False, axis="x")


def _draw_spread(axes: Axes, families: Families, colours: Mapping[str, str]) -> None:
    axes.set(title="By architecture", xlabel="accuracy (%), line: mean", xmargin=0.08)
    for place, (name, own) in enumerate(families.items()):
        values, colour = [*own.values()], colours[name]
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=6)
        axes.plot(fmean(values), place, "|", color=colour, markersize=22, markeredgewidth=3)
    short = [name.rpartition(":")[2] for name in families]  # of "module:factory"
    axes.set_yticks(range(len(short)), short)
    axes.set_ylim(len(short) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
