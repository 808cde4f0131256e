"""The comparison as one PNG: accuracy by round, by traffic (both ways or up) and by time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.report.charts import LOG_FROM, Line, lines_of, plain, x_unit
from experiments.report.curves import Axis
from experiments.report.groups import Study
from experiments.report.looks import looks_for
from experiments.report.svg import spread
from server_app.output.figures import INK, Layout, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "round": "By round", "bytes": "By traffic", "bytes-up": "By traffic to the server",
    "seconds": "By time",
}  # fmt: skip
NAME_WIDTH = 24  # characters right of the axes


def draw_comparison(study: Study, target: Path, *, traffic: Axis = "bytes") -> bool:
    """Draw the accuracy of every group; return False where nothing was evaluated.

    `traffic` is "bytes" (both directions) or "bytes-up".
    """
    shown: tuple[Axis, ...] = ("round", traffic, "seconds")
    looks = looks_for([(group.key, group.method) for group in study.groups])
    panels = {axis: lines_of(study, looks, axis) for axis in shown}
    if not any(panels.values()):
        return False
    several = any(len(group.counted) > 1 for group in study.groups)
    seeds = sorted({member.seed for member in study.members})
    subtitle = (
        f"micro test accuracy; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    )
    subtitle += "; bands: one standard error over seeds" if several else ""
    subtitle += "; †: did not complete" if any(line.open for line in panels["round"]) else ""
    layout = Layout(_title(study), subtitle, (14.0, 4.6), "abc", (1.0, 1.0, 1.0))
    with picture(layout, target) as figure:
        for axes, axis in zip(figure.axes, shown, strict=True):
            _panel(axes, panels[axis], axis)
    return True


def _title(study: Study) -> str:
    data = sorted({str(m.run.config.get("dataset", "?")) for m in study.members})
    clients = sorted({int(m.run.summary.get("num_clients", 0)) for m in study.members})
    return f"{', '.join(data)} · {' or '.join(map(str, clients))} clients"


def _panel(axes: Axes, lines: Sequence[Line], axis: Axis) -> None:
    paid = [line for line in lines if line.end > 0]
    unit, size = x_unit(axis, max((line.end for line in paid), default=1.0))
    axes.set(title=TITLES[axis], xlabel=unit)
    if axis == "round":
        axes.set_ylabel("test accuracy (%)")
    ends = [line.end for line in paid]
    log = axis != "round" and bool(ends) and max(ends) > LOG_FROM * min(ends)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: plain(value))
    for line in paid:
        draw_line(axes, line, size)
    for line in lines:
        if line.end <= 0:
            axes.axhline(100 * line.curve.y[-1], color=line.look.light, linestyle=_style(line))
    if ends and not log:
        axes.set_xlim(0, max(ends) / size)
    axes.set_ylim(bottom=0)
    name_ends(axes, lines)


def draw_line(axes: Axes, line: Line, size: float = 1.0) -> None:
    """Draw a curve with its band, accuracy in %; `size` is the unit of the x axis."""
    curve, colour = line.curve, line.look.light
    x, y = [value / size for value in curve.x], [100 * value for value in curve.y]
    axes.plot(x, y, color=colour, linestyle=_style(line), linewidth=1.0 if line.open else 1.9)
    if curve.has_band:
        errors = [100 * (error or 0.0) for error in curve.error]
        low = [max(0.0, a - e) for a, e in zip(y, errors, strict=True)]
        high = [min(100.0, a + e) for a, e in zip(y, errors, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def _style(line: Line) -> str | tuple[int, tuple[float, ...]]:
    if line.open:
        return ":"
    # matplotlib counts dashes in line widths
    return (0, tuple(0.6 * part for part in line.look.pattern)) if line.look.dash else "-"


def _fitting(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1].rstrip() + "…"


def name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write every line's name in its colour at the right edge, moved apart."""
    top = axes.get_ylim()[1]
    wanted = [100 * line.curve.y[-1] for line in lines]
    for line, at in zip(lines, spread(wanted, gap=top / 22, low=0, high=top), strict=True):
        axes.annotate(
            _fitting(line.short),
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=line.look.light if not line.open else INK,
        )
