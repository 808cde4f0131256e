"""The picture of a run: accuracy, loss and traffic by round, and what joining is worth.

Drawn by the server when a run ends, and by the command line again later, from the folder alone:
metrics.jsonl, clients.csv, and config.json and summary.json for the title.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Self

from common.errors import RunError
from common.files import best_round, read_rows
from common.messages import ALONE
from server_app.output.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    Layout,
    Row,
    column,
    draw_column,
    finish_axes,
    folder_title,
    markers,
    picture,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = {
    f"accuracy_{ALONE}": (MUTED, "alone", "alone: the same model, without the federation"),
    "accuracy_own": (GREEN, "own", "own model by itself"),
    "accuracy_common": (PURPLE, "common", "common model by itself"),
    "accuracy_head": (PURPLE, "head", "own features under the received head"),
    "accuracy_global": (PURPLE, "global", "as received, before the local epoch"),
    "accuracy_micro": (BLUE, "predictor", "predictor: what participants use"),
}
"""Colour, name and meaning of each predictor's curve; the one that counts is drawn last."""
MOST_BARS = 12


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

    Where clients measured what they reach alone, also their gains. Takes a run folder; rows without
    an evaluation leave gaps in no curve. Writes `curves.png` there unless another PNG is named, and
    returns its path.
    """
    rows, gains = read_rows(folder / "metrics.jsonl"), _gains(folder / "clients.csv")
    target = target or folder / "curves.png"
    form = ((11.0, 7.6), "ab;ab;cd", (1.5, 1.0)) if gains else ((11.0, 5.8), "ab;ac", (1.75, 1.0))
    several = sum(bool(column(rows, key)[0]) for key in CURVES) > 1
    with picture(Layout(folder_title(folder), _outcome(rows), *form), target) as figure:
        accuracy, *middle, loss, traffic = figure.axes
        (_draw_predictors if several else _draw_accuracy)(accuracy, rows, reference)
        for axes in middle:
            draw_gains(axes, gains)
            loss.set_xlabel("round")
        _draw_loss(loss, rows, reference)
        _draw_traffic(traffic, rows)
    return target


def _gains(path: Path) -> list[float]:
    """Read the gains of those clients that measured them, in points."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [100 * float(row["gain"]) for row in csv.DictReader(file) if row.get("gain")]


def draw_gains(axes: Axes, gains: Sequence[float]) -> None:
    """Draw how many clients gain and lose how much over training alone, in points."""
    from matplotlib.ticker import MaxNLocator

    axes.set(title="What joining is worth", ylabel="participants")
    axes.set_xlabel("accuracy minus accuracy alone (points)")
    low, high = min(0.0, *gains), max(0.0, *gains)
    width = next((w for w in (1, 2, 5, 10) if high - low <= w * MOST_BARS), 20)
    first, last = math.floor(low / width), math.ceil(high / width) + 1
    edges = [width * place for place in range(first, last + 1)]
    won, lost = [g for g in gains if g > 0], [g for g in gains if g < 0]
    for side, color in ((won, BLUE), (lost, ORANGE)):
        axes.hist(side, bins=edges, color=color, edgecolor="white")
    axes.bar(0, len(gains) - len(won) - len(lost), width=width / 3, color=MUTED, zorder=3)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set_title(f"{len(won)} of {len(gains)} gain", loc="right", size=10, color=BLUE)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.grid(visible=False, axis="x")


def _draw_predictors(axes: Axes, rows: Sequence[Row], reference: Reference | None) -> None:
    axes.set(title="Test accuracy, all examples", xlabel="round", ylabel="accuracy (%)")
    ends = []
    for key, (color, name, words) in CURVES.items():
        if values := column(rows, key)[1]:
            width = 3.0 if key == "accuracy_micro" else 1.7
            draw_column(axes, rows, key, color=color, label=words, scale=100, linewidth=width)
            ends.append((100 * values[-1], f"{name} {100 * values[-1]:.1f}", color))
    if reference:
        _dashed(axes, rows, reference, [100 * v for v in reference.accuracy])
    finish_axes(axes, rows, legend=False)
    axes.legend(*(reversed(part) for part in axes.get_legend_handles_labels()), loc="lower right")
    axes.set_ylim(bottom=0)
    top = axes.get_ylim()[1]
    ends.sort(reverse=True)
    places = spread([end for end, _, _ in ends], gap=top / 24, high=top)
    for (_, text, color), place in zip(ends, places, strict=True):
        axes.annotate(
            text, (1.0, place), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=color, weight="bold", size=9,
        )  # fmt: skip


def _outcome(rows: Sequence[Row]) -> str:
    rounds, values = column(rows, "accuracy_micro")
    if not values:
        return f"{len(rows)} rounds, no evaluation yet"
    found = f"micro accuracy {100 * values[-1]:.1f} % after round {rounds[-1]}"
    if (best := best_round(rows)) and best["round"] != rounds[-1]:
        found += f", {100 * best['accuracy_micro']:.1f} % in round {int(best['round'])}"
    return f"{found}, the best on validation" if best else found


def _draw_accuracy(axes: Axes, rows: Sequence[Row], reference: Reference | None) -> None:
    axes.set(title="Test accuracy", xlabel="round", ylabel="accuracy (%)")
    draw_column(axes, rows, "accuracy_micro", color=BLUE, label="all examples (micro)", scale=100)
    draw_column(
        axes, rows, "accuracy_macro", color=GREEN, label="mean of clients (macro)", scale=100
    )
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
    draw_column(axes, rows, "test_loss", color=BLUE, label="test")
    draw_column(axes, rows, "train_loss", color=MUTED, label="local training")
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
            axes.plot(x, [t / size for t in totals], color=color, label=label, **markers(x))
    finish_axes(axes, rows)
    axes.set_ylim(bottom=0)


def _dashed(axes: Axes, rows: Sequence[Row], reference: Reference, values: Sequence[float]) -> None:
    last = max((int(row["round"]) for row in rows), default=reference.rounds[-1])
    points = [(x, y) for x, y in zip(reference.rounds, values, strict=True) if x <= last]
    axes.plot(*zip(*points, strict=True), color=ORANGE, linestyle="--", label="reference")
