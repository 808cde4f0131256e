"""Pictures of a finished run that need to know architectures: one bar per client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from experiments.report.runs import ClientRow, Run
from server_app.output.figures import INK, Layout, folder_title, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Chosen to stay apart for colour-blind readers and in greyscale.
PALETTE = (
    "#1f6fb4",
    "#d9641e",
    "#2a8c6a",
    "#b04a8f",
    "#c79a1b",
    "#6a5acd",
    "#4aa6c9",
    "#8a5a3c",
    "#7a8794",
)


def draw_clients(run: Run, target: Path | None = None) -> Path:
    """Draw every client's test accuracy, coloured by architecture, and each architecture's spread.

    Returns
    -------
    The path of the picture; `clients.png` in the run's folder when no target is given.
    """
    target = target or run.folder / "clients.png"
    families = run.families()
    colors = family_colors(families[client.client_id] for client in run.clients)
    layout = Layout(folder_title(run.folder), _subtitle(run.clients), (11.0, 4.9), "ab", (2.4, 1.0))
    with picture(layout, target) as figure:
        bars, spread = figure.axes
        _draw_bars(bars, run.clients, families, colors)
        _draw_spread(spread, run.clients, families, colors)
    return target


def family_colors(names: Iterable[str]) -> dict[str, str]:
    """Give each name a colour, in the order of their first appearance."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def _draw_bars(
    axes: Axes,
    clients: Sequence[ClientRow],
    families: Mapping[str, str],
    colors: Mapping[str, str],
) -> None:
    axes.set(title="Test accuracy of each client's own model", ylabel="accuracy (%)")
    for name, color in colors.items():
        own = [i for i, client in enumerate(clients) if families[client.client_id] == name]
        heights = [100 * clients[i].accuracy for i in own]
        axes.bar(own, heights, width=0.82, color=color, label=name)
    if clients:
        mean = 100 * fmean(client.accuracy for client in clients)
        axes.axhline(mean, color=INK, linewidth=1.0, linestyle=(0, (5, 3)))
        axes.annotate(
            f"mean\n{mean:.1f} %",
            (1.0, mean),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    step = max(1, -(-len(clients) // 25))
    axes.set_xticks(range(0, len(clients), step), [c.client_id for c in clients[::step]])
    axes.set_xlim(-0.8, max(len(clients), 1) - 0.2)
    axes.set_xlabel("client")
    axes.set_ylim(0, 100)
    axes.grid(visible=False, axis="x")


def _draw_spread(
    axes: Axes,
    clients: Sequence[ClientRow],
    families: Mapping[str, str],
    colors: Mapping[str, str],
) -> None:
    axes.set(title="By architecture", xlabel="accuracy (%), line: mean", xmargin=0.08)
    for place, (name, color) in enumerate(colors.items()):
        values = [100 * c.accuracy for c in clients if families[c.client_id] == name]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=6)
        axes.plot(fmean(values), place, "|", color=color, markersize=22, markeredgewidth=3)
    axes.set_yticks(range(len(colors)), [_short(name) for name in colors])
    axes.set_ylim(len(colors) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")


def _short(name: str) -> str:
    return name.rpartition(":")[2]  # of "module:factory"


def _subtitle(clients: Sequence[ClientRow]) -> str:
    if not clients:
        return "no client was evaluated"
    worst = min(clients, key=lambda client: client.accuracy)
    best = max(clients, key=lambda client: client.accuracy)
    return (
        f"newest evaluation; from {100 * worst.accuracy:.1f} % (client {worst.client_id}) "
        f"to {100 * best.accuracy:.1f} % (client {best.client_id})"
    )
