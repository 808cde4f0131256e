"""The charts of the page: accuracy curves, gains over Local, maps of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from experiments.report.curves import Axis, Curve, mean_curve, single_curve
from experiments.report.gain import GroupGain
from experiments.report.groups import Group, Study
from experiments.report.looks import Look
from experiments.report.svg import BOLD, Drawing, Frame, Scale, cut, nice_ticks, spread

WIDTH, HEIGHT = 440.0, 350.0
LEFT, TOP, BOTTOM = 40.0, 28.0, 40.0
LABEL_GAP = 14.0
MARK_LENGTH = 3
MOST_LABELS, LONGEST = 18, 15
LOG_FROM = 30.0
"""Ratio of the largest to the smallest end from which an axis is logarithmic."""


@dataclass(frozen=True)
class Line:
    """A curve with its look and names; `open` marks a run that never completed."""

    curve: Curve
    look: Look
    label: str
    short: str
    open: bool = False

    @property
    def end(self) -> float:
        """Where it ends in x."""
        return self.curve.x[-1]


def lines_of(study: Study, looks: Mapping[str, Look], axis: Axis) -> list[Line]:
    """Return a line for each group's mean, and one for every run that has not completed."""
    lines: list[Line] = []
    for group in study.groups:
        look = looks[group.key]
        curve = mean_curve(group, axis)
        if curve:
            lines.append(Line(curve, look, _described(group), group.short))
        for member in group.left_out:
            single = single_curve(member, axis)
            if member.status != "completed" and single:
                label = f"{group.label}, seed {member.seed}: {member.left_out}"
                lines.append(Line(single, look, label, f"{group.short} †", open=True))
    return lines


def accuracy_chart(lines: Sequence[Line], axis: Axis) -> str:
    """Draw accuracy against rounds, bytes or seconds, with bands of a standard error.

    The accuracy axis starts at 0. A line that costs nothing on the x axis (no traffic) is drawn
    across the whole chart at its last accuracy.
    """
    drawing = Drawing(WIDTH, HEIGHT, f"Test accuracy by {axis}")
    right = BOLD * max((min(len(line.short), LONGEST) for line in lines), default=0) + 14
    free = [line for line in lines if line.end <= 0]
    paid = [line for line in lines if line.end > 0]
    unit, size = x_unit(axis, max((line.end for line in paid), default=1.0))
    frame = Frame(
        _x_scale(paid, axis, size, WIDTH - right),
        Scale(0.0, _top(lines), HEIGHT - BOTTOM, TOP),
    )
    titles = (unit + (", logarithmic" if frame.x.log else ""), "test accuracy (%)")
    frame.draw_axes(drawing, titles, (plain, plain))
    for line in sorted(paid, key=lambda line: not line.open):
        _draw_line(drawing, frame, line, size)
    for line in free:
        at = frame.y(100 * line.curve.y[-1])
        span = ((frame.x.start, at), (frame.x.end, at))
        drawing.line(span, line.look, name=f"{line.label}: no traffic")
    _label_ends(drawing, frame, [*paid, *free], size)
    return drawing.svg()


def gain_chart(gains: Sequence[GroupGain], looks: Mapping[str, Look]) -> str:
    """Draw every client's gain over Local, a row for each group, and the mean with its error."""
    row, head = 46.0, 34.0
    drawing = Drawing(WIDTH, head + row * len(gains) + 42, "Gain of every client over Local")
    points = [100 * c.gain for gain in gains for c in gain.clients]
    margin = 0.04 * (max([*points, 0.0]) - min([*points, 0.0]) or 1.0)
    x = Scale(min([*points, 0.0]) - margin, max([*points, 0.0]) + margin, 10, WIDTH - 10)
    bottom = head + row * len(gains)
    for tick in x.ticks(6):
        drawing.rule((x(tick), head), (x(tick), bottom), "base" if tick == 0 else "grid")
        drawing.text((x(tick), bottom + 16), signed(tick), css="tick", anchor="middle")
    drawing.text((x(0) - 5, head - 18), "← worse than alone", css="axis", anchor="end")
    drawing.text((x(0) + 5, head - 18), "better →", css="axis")
    words = "accuracy minus Local's (points), a dot for each client and seed"
    drawing.text((WIDTH / 2, bottom + 34), words, css="axis", anchor="middle")
    for place, gain in enumerate(gains):
        _gain_row(drawing, x, gain, looks[gain.group.key], head + row * place)
    return drawing.svg()


@dataclass(frozen=True)
class MapPoint:
    """A client on the map: its place, its colour, its mark, and what shows under the pointer.

    The colour is one of the page's (its number) or a fixed one ("#rrggbb"). `light` says that
    dark writing reads better on it.
    """

    x: float
    y: float
    colour: int | str
    mark: str
    name: str
    light: bool = False


@dataclass(frozen=True)
class MapAxes:
    """How much of the variance the two axes of a map explain, and what the map is called."""

    title: str
    shares: tuple[float, float]


def map_chart(
    points: Sequence[MapPoint], axes: MapAxes, *, links: Sequence[tuple[int, int, float]] = ()
) -> str:
    """Draw clients where their embeddings lie; both axes have the same unit.

    `links` are pairs of points with a weight from 0 to 1: the stronger, the darker.
    """
    size = 330.0
    drawing = Drawing(WIDTH, size + 34, axes.title)
    xs, ys = [p.x for p in points], [p.y for p in points]
    reach = max(max(xs) - min(xs), max(ys) - min(ys), 1e-9) * 0.58
    middle = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    left = (WIDTH - size) / 2
    x = Scale(middle[0] - reach, middle[0] + reach, left, left + size)
    y = Scale(middle[1] - reach, middle[1] + reach, size + 6, 6)
    drawing.box(left, 6, size, size)
    for a, b, weight in links:
        ends = [(x(points[i].x), y(points[i].y)) for i in (a, b)]
        drawing.rule(ends[0], ends[1], f"link l{min(3, int(4 * weight))}")
    for point in points:
        at = (x(point.x), y(point.y))
        drawing.disc(*at, point.colour, name=point.name)
        fixed = " fixed" if isinstance(point.colour, str) else ""
        css = f"mark{fixed}{' dark' if point.light else ''}"
        if len(point.mark) <= MARK_LENGTH:
            drawing.text((at[0], at[1] + 3.4), point.mark, css=css, anchor="middle")
    first, second = (f"{100 * share:.0f} %" for share in axes.shares)
    words = f"component 1 ({first} of the variance)"
    drawing.text((WIDTH / 2, size + 24), words, css="axis", anchor="middle")
    drawing.upright((left - 8, size / 2 + 6), f"component 2 ({second})")
    return drawing.svg()


def x_unit(axis: Axis, largest: float) -> tuple[str, float]:
    """Return an axis title and how many of its units the numbers are divided by.

    >>> x_unit("bytes", 5e9), x_unit("seconds", 60)
    (('GB, up and down, all clients', 1000000000.0), ('seconds', 1.0))
    """
    if axis in ("bytes", "bytes-up"):
        name, size = (
            ("GB", 1e9) if largest >= 2e9 else ("MB", 1e6) if largest >= 2e6 else ("kB", 1e3)
        )
        way = "up" if axis == "bytes-up" else "up and down"
        return f"{name}, {way}, all clients", size
    if axis == "seconds":
        units = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        return next((n, s) for n, s in units if largest >= 3 * s or s == 1.0)
    return "round", 1.0


def plain(value: float) -> str:
    """Write a tick without trailing zeros.

    >>> plain(20.0), plain(0.5), plain(12000)
    ('20', '0.5', '12,000')
    """
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def signed(value: float) -> str:
    """Write a difference with its sign.

    >>> signed(5.0), signed(-2.5), signed(0.0)
    ('+5', '−2.5', '0')
    """
    return ("+" if value > 0 else "\u2212" if value < 0 else "") + plain(abs(value))


def _described(group: Group) -> str:
    return f"{group.label}: {len(group.counted)} seed{'s' if len(group.counted) > 1 else ''}"


def _top(lines: Sequence[Line]) -> float:
    """Return the end of the accuracy axis: a round number not below any line or band."""
    highest = 1.0
    for line in lines:
        pairs = zip(line.curve.y, line.curve.error, strict=True)
        highest = max([highest, *(100 * (y + (e or 0.0)) for y, e in pairs)])
    step = nice_ticks(0, highest, 5)[1] if highest > 1 else 0.25
    return min(100.0, math.ceil(highest / step - 1e-9) * step)


def _x_scale(lines: Sequence[Line], axis: Axis, size: float, right: float) -> Scale:
    if not lines:
        return Scale(0.0, 1.0, LEFT, right)
    ends = [line.end for line in lines]
    if axis != "round" and max(ends) > LOG_FROM * min(ends):
        starts = [next(x for x in line.curve.x if x > 0) for line in lines]
        return Scale(min(starts) / size, max(ends) / size, LEFT, right, log=True)
    return Scale(0.0, max(ends) / size, LEFT, right)


def _draw_line(drawing: Drawing, frame: Frame, line: Line, size: float) -> None:
    curve = line.curve
    places = [(frame.x(x / size), frame.y(100 * y)) for x, y in zip(curve.x, curve.y, strict=True)]
    if curve.has_band:
        sides = []
        for sign in (1, -1):
            values = zip(curve.y, curve.error, strict=True)
            ends = [frame.y(min(max(100 * (y + sign * (e or 0)), 0), 100)) for y, e in values]
            sides.append([(at[0], end) for at, end in zip(places, ends, strict=True)])
        drawing.band(sides[0], sides[1], line.look)
    name = f"{line.label}; last {100 * curve.y[-1]:.1f} %"
    if line.open:
        drawing.line(places, Look(line.look.colour, 0), name=name, css="open")
        drawing.dot(*places[-1], line.look, radius=3.2, name=name)
        return
    drawing.line(places, line.look, name=name)
    if len(places) <= 15:
        for x, y in places:
            drawing.dot(x, y, line.look, radius=2.4, name=name)


def _label_ends(drawing: Drawing, frame: Frame, lines: Sequence[Line], size: float) -> None:
    """Write each line's name at its end, moved apart, with a leader where it was moved far."""
    chosen = sorted(lines, key=lambda line: (line.open, -line.curve.y[-1]))[:MOST_LABELS]
    wanted = [frame.y(100 * line.curve.y[-1]) for line in chosen]
    placed = spread(wanted, gap=LABEL_GAP, low=TOP - 4, high=HEIGHT - BOTTOM)
    for line, at, end in zip(chosen, placed, wanted, strict=True):
        x_end = frame.x(line.end / size) if line.end > 0 else frame.x.end
        start = frame.x.end + 10
        if abs(at - end) > 3 or start - x_end > 14:
            drawing.rule((x_end + 3, end), (start - 2, at), f"lead k{line.look.colour}")
        css = f"label k{line.look.colour}"
        drawing.text((start, at + 4), cut(line.short, WIDTH - start), css=css)


def _gain_row(drawing: Drawing, x: Scale, gain: GroupGain, look: Look, top: float) -> None:
    middle = top + 29
    better = f"{gain.num_better} of {len(gain.clients)} better"
    drawing.text((10, top + 12), cut(gain.group.label, 250), css=f"label k{look.colour}")
    words = f"{signed(round(100 * gain.mean.mean, 1))}{_error(gain)}; {better}"
    drawing.text((WIDTH - 10, top + 12), words, css="tick", anchor="end")
    random = Random(gain.group.key)
    for client in gain.clients:
        name = f"client {client.client_id}, seed {client.seed}, {client.family}: "
        name += f"{signed(round(100 * client.gain, 1))} points"
        at = middle + random.uniform(-7, 7)  # spread in height only, so that dots do not hide
        drawing.dot(x(100 * client.gain), at, Look(look.colour, 0), name=name, css="faint")
    mean = x(100 * gain.mean.mean)
    if gain.mean.error:
        ends = [x(100 * (gain.mean.mean + s * gain.mean.error)) for s in (-1, 1)]
        drawing.rule((ends[0], middle), (ends[1], middle), "error")
    drawing.rule((mean, middle - 11), (mean, middle + 11), "mean")


def _error(gain: GroupGain) -> str:
    return f" ± {100 * gain.mean.error:.1f}" if gain.mean.error is not None else ""
