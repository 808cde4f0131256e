"""The figures of the page and of `compare`: accuracy, gains over Local, maps of embeddings.

matplotlib draws them, never through pyplot. On the page a figure is inline SVG whose colours are
the page's own CSS variables, so that it is sharp at any size and follows light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from random import Random
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.report.gain import GroupGain
from experiments.report.groups import Study
from experiments.report.lines import Axis, Line, lines_of
from experiments.report.looks import DASHES, LIGHT, Look, looks_for
from server_app.output.figures import GRID, INK, MUTED, STYLE, Layout, picture, spread

PAPER, WHITE, DARK_INK = "#ffffff", "#fefefe", "#14181d"
"""PAPER follows the page; WHITE and DARK_INK, on colours of a scale, do not."""
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--quiet)", GRID: "var(--grid)", PAPER: "var(--paper)",
    **{colour: f"var(--k{place})" for place, colour in enumerate(LIGHT)},
}  # fmt: skip
PAGE_STYLE: Any = {
    **STYLE, "font.size": 11.5, "axes.titlesize": 11.5, "svg.fonttype": "none",
    "svg.hashsalt": "mh-pfedhn",
}  # fmt: skip
WIDTH_IN = 6.1
"""At 72 units an inch about as wide as a phone's screen: writing keeps its size there."""
TITLES: Mapping[Axis, str] = {
    "round": "By round", "bytes": "By traffic", "bytes-up": "By traffic to the server",
    "seconds": "By time",
}  # fmt: skip
LOG_FROM = 30.0
"""Ratio of the largest to the smallest end from which an axis is logarithmic."""
MOST_MARKERS, MOST_LABELS, LONGEST_NAME, LONGEST_MARK = 15, 18, 24, 3
TIP = "tip "


def inline_svg(draw: Callable[[Axes], None], *, height_in: float, title: str) -> str:
    """Return what `draw` draws as an SVG element; readers that cannot see it get its title."""
    with mpl.rc_context(PAGE_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure.subplots())
        sink = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    return _for_page(sink.getvalue(), title)


def draw_comparison(study: Study, target: Path, *, traffic: Axis = "bytes") -> bool:
    """Draw accuracy by round, traffic and time as one PNG; False where nothing was evaluated.

    `traffic` is "bytes" (both directions) or "bytes-up".
    """
    looks = looks_for([(group.key, group.method) for group in study.groups])
    panels = {axis: lines_of(study, looks, axis) for axis in ("round", traffic, "seconds")}
    if not any(panels.values()):
        return False
    data = sorted({str(run.config.get("dataset", "?")) for run in study.runs})
    clients = sorted({str(run.summary.get("num_clients", 0)) for run in study.runs}, key=len)
    seeds = sorted({run.seed for run in study.runs})
    words = [f"micro test accuracy; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"]
    if any(len(group.counted) > 1 for group in study.groups):
        words.append("bands: one standard error over seeds")
    if any(line.open for line in panels["round"]):
        words.append("†: did not complete")
    title = f"{', '.join(data)} · {' or '.join(clients)} clients"
    layout = Layout(title, "; ".join(words), (14.0, 4.6), "abc", (1.0, 1.0, 1.0))
    with picture(layout, target) as figure:
        for axes, (axis, lines) in zip(figure.axes, panels.items(), strict=True):
            axes.set_title(TITLES[axis])
            draw_accuracy(axes, lines, axis)
    return True


def draw_accuracy(
    axes: Axes, lines: Sequence[Line], axis: Axis, *, longest: int = LONGEST_NAME
) -> None:
    """Draw accuracy (%) against rounds, bytes or seconds, with bands of a standard error.

    The accuracy axis starts at 0. A line that costs nothing on the x axis (no traffic) is drawn
    across the whole chart at its last accuracy. Names have at most `longest` characters.
    """
    ends = [line.end for line in lines if line.end > 0]
    unit, size = x_unit(axis, max(ends, default=1.0))
    if axis != "round" and ends and max(ends) > LOG_FROM * min(ends):
        unit += ", logarithmic"
        axes.set_xscale("log")
    elif ends:
        axes.set_xlim(0, max(ends) / size)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set(xlabel=unit, ylabel="test accuracy (%)")
    for line in lines:
        if line.end > 0:
            draw_line(axes, line, size)
        else:
            axes.axhline(line.last, **_stroke(line), gid=f"{TIP}{line.label}: no traffic")
    tops = (max(np.add(line.curve.y, line.curve.error)) for line in lines)
    axes.set_ylim(0, min(100.0, 105 * max(tops, default=1.0)) or 1.0)
    name_ends(axes, lines, longest=longest)


def draw_line(axes: Axes, line: Line, size: float = 1.0) -> None:
    """Draw a curve with its band, accuracy in %; `size` is the unit of the x axis."""
    x, y, error = (np.array(v) for v in (line.curve.x, line.curve.y, line.curve.error))
    face = PAPER if line.look.dash else line.look.light
    shown = [-1] if line.open else slice(None) if len(x) <= MOST_MARKERS else []
    axes.plot(
        x / size, 100 * y, **_stroke(line), marker="o", markersize=4, markerfacecolor=face,
        markevery=shown, clip_on=False, gid=f"{TIP}{line.label}; last {line.last:.1f} %",
    )  # fmt: skip
    if error.any():
        low, high = (np.clip(100 * (y + sign * error), 0, 100) for sign in (-1, 1))
        axes.fill_between(x / size, low, high, color=line.look.light, alpha=0.16, linewidth=0)


def name_ends(axes: Axes, lines: Sequence[Line], *, longest: int = LONGEST_NAME) -> None:
    """Write every line's name in its colour at the right edge, moved apart."""
    top = axes.get_ylim()[1]
    shown = sorted(lines, key=lambda line: (line.open, -line.last))[:MOST_LABELS]
    places = spread([line.last for line in shown], gap=top / 22, high=top)
    for line, place in zip(shown, places, strict=True):
        axes.annotate(
            _cut(line.short, longest), (1.0, place), xycoords=("axes fraction", "data"),
            xytext=(6, 0), textcoords="offset points", va="center",
            size=0.9 * mpl.rcParams["font.size"],
            weight="bold", color=line.look.light,
        )  # fmt: skip


def draw_gains(axes: Axes, gains: Sequence[GroupGain], looks: Mapping[str, Look]) -> None:
    """Draw every client's gain over training alone, a row a group, and the mean with its error."""
    across = axes.get_yaxis_transform()  # x from 0 (left) to 1 (right), y in rows
    axes.axvline(0, color=MUTED, linewidth=1.0)
    for row, gain in enumerate(gains):
        look, random = looks[gain.group.key], Random(gain.group.key)
        mean, error = 100 * gain.mean.mean, 100 * (gain.mean.error or 0.0)
        axes.text(0.01, row - 0.3, _cut(gain.group.label, 34), color=look.light, weight="bold",
                  va="center", transform=across)  # fmt: skip
        said = f"{mean:+.1f}" + (f" ± {error:.1f}" if gain.mean.error is not None else "")
        said += f"; {gain.num_better} of {len(gain.clients)} better"
        axes.text(0.99, row - 0.3, said, color=MUTED, va="center", ha="right", transform=across)
        for client in gain.clients:
            tip = f"{TIP}client {client.client_id}, seed {client.seed}, {client.family}: "
            place = row + 0.12 + random.uniform(-0.13, 0.13)  # apart, so that dots do not hide
            axes.plot(100 * client.gain, place, "o", color=look.light, alpha=0.5, markersize=7,
                      markeredgewidth=0, gid=f"{tip}{100 * client.gain:+.1f} points")  # fmt: skip
        axes.errorbar(mean, row + 0.12, xerr=error, color=INK, elinewidth=3, alpha=0.5)
        axes.plot(mean, row + 0.12, "|", color=INK, markersize=20, markeredgewidth=2.4)
    axes.set(yticks=[], ylim=(len(gains) - 0.5, -0.6))
    axes.set_xlabel("accuracy minus that alone (points); a dot for each client and seed")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    for words, side, shift in (("← worse than alone", "right", -5), ("better →", "left", 5)):
        axes.annotate(words, (0, 1), xycoords=("data", "axes fraction"), xytext=(shift, 6),
                      textcoords="offset points", ha=side, color=MUTED)  # fmt: skip


def draw_map(
    axes: Axes, places: NDArray[np.float64], names: Sequence[str], *, colours: Sequence[str],
    tips: Sequence[str], marks: Sequence[str],
) -> None:  # fmt: skip
    """Draw clients at their places (clients, 2), both axes in one unit.

    `tips` show under the pointer; `marks` are the colours of the names.
    """
    for (x, y), name, colour, tip, mark in zip(places, names, colours, tips, marks, strict=True):
        axes.plot(x, y, "o", color=colour, markersize=17, markeredgecolor=INK,
                  markeredgewidth=0.7, gid=f"{TIP}client {name}: {tip}")  # fmt: skip
        if len(name) <= LONGEST_MARK:
            axes.text(x, y, name, color=mark, ha="center", va="center_baseline", size=9.5,
                      weight="bold")  # fmt: skip
    axes.set(xticks=[], yticks=[], xmargin=0.08, ymargin=0.08)
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set(visible=True, color=GRID)


def swatch(look: Look) -> str:
    """Return a short line in a look as inline SVG, for tables and legends."""
    dash = " ".join(f"{2 * part:g}" for part in DASHES[look.dash])
    return (
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" '
        f'stroke="var(--k{look.colour})" stroke-width="2" stroke-dasharray="{dash}"/></svg>'
    )


def x_unit(axis: Axis, largest: float) -> tuple[str, float]:
    """Return an axis title and how many of its units the numbers are divided by.

    >>> x_unit("bytes", 5e9), x_unit("seconds", 60)
    (('GB, up and down, all clients', 1000000000.0), ('seconds', 1.0))
    """
    if axis == "round":
        return "round", 1.0
    if axis == "seconds":
        units = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        return next((name, size) for name, size in units if largest >= 3 * size or size == 1.0)
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    name, size = next((unit for unit in units if largest >= 2 * unit[1]), units[-1])
    return f"{name}, {'up' if axis == 'bytes-up' else 'up and down'}, all clients", size


def _for_page(svg: str, title: str) -> str:
    """Take from matplotlib's SVG what a page does not need; colours become the page's own."""
    box = re.search(r'viewBox="([^"]+)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(r'<g id="tip ([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"(\.\d\d)\d+", r"\1", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    size = box[1] if box else ""
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(title)}">{body}'


def _stroke(line: Line) -> dict[str, Any]:
    style = ":" if line.open else (0, DASHES[line.look.dash]) if line.look.dash else "-"
    return {"color": line.look.light, "linestyle": style, "linewidth": 1.4 if line.open else 1.9}


def _cut(words: str, longest: int) -> str:
    return words if len(words) <= longest else words[: longest - 1].rstrip() + "…"
