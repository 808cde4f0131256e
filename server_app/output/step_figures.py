"""Draw what the server's steps did: how far theta went, how far deltas pointed, who agreed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server_app.output.figures import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    Layout,
    Row,
    column,
    finish_axes,
    folder_title,
    picture,
    read_rows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

NEEDED = "rms_theta_change"
LEAST_ROUNDS = 4
"""A curve of fewer points says nothing."""


def draw_steps(folder: Path, *, target: Path | None = None) -> Path | None:
    """Draw the diagnostics of the server's steps by round, means over the steps of a round.

    Parameters
    ----------
    folder
        A run folder.
    target
        PNG to write; `steps.png` in the folder when left out.

    Returns
    -------
    The path of the picture; None when the method takes no such steps (baselines), or in fewer than
    `LEAST_ROUNDS` rounds.
    """
    rows = read_rows(folder / "metrics.jsonl")
    if len(column(rows, NEEDED)[0]) < LEAST_ROUNDS:
        return None
    target = target or folder / "steps.png"
    subtitle = "the server's steps, means over the steps of a round"
    layout = Layout(folder_title(folder), subtitle, (11.0, 5.8), "ab;cd", (1.0, 1.0))
    with picture(layout, target) as figure:
        moves, rate, agreement, age = figure.axes
        _draw_moves(moves, rows)
        _draw_one(rate, rows, "effective_rate", "Effective rate", "change of theta / delta", ORANGE)
        _draw_agreement(agreement, rows)
        _draw_one(age, rows, "mean_staleness", "Staleness", "server steps since dispatch", MUTED)
        age.set_xlabel("round")
        age.set_ylim(0, 1.1 * max([1.0, *column(rows, "mean_staleness")[1]]))
    return target


def _draw_moves(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(title="Root mean square by parameter", ylabel="rms (log scale)", yscale="log")
    for key, label, color in (
        (NEEDED, "change of theta by one server step", BLUE),
        ("rms_delta", "delta of a client", GREEN),
    ):
        axes.plot(*column(rows, key), color=color, label=label)
    finish_axes(axes, rows)


def _draw_agreement(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(title="Coherence of the deltas", xlabel="round", ylabel="|mean|² / mean of |delta|²")
    axes.plot(*column(rows, "coherence"), color=BLUE, label="measured")
    x, counts = column(rows, "num_updates")
    chance = [1 / max(1.0, count) for count in counts]
    axes.plot(x, chance, color=MUTED, linestyle="--", label="unrelated deltas (1 / updates)")
    finish_axes(axes, rows)
    axes.set_ylim(0, min(1.05, 1.15 * max([0.05, *column(rows, "coherence")[1], *chance])))


def _draw_one(
    axes: Axes, rows: Sequence[Row], key: str, title: str, ylabel: str, color: str
) -> None:
    axes.set(title=title, ylabel=ylabel)
    axes.plot(*column(rows, key), color=color)
    finish_axes(axes, rows, legend=False)
