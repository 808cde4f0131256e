"""Draw charts as inline SVG: sharp at any size, in the page's own colours, light or dark.

A colour is a class (`k0` to `k7`), so that the page's style sheet decides it; see page.css. All
lengths are in user units of a view box that is as wide as a phone's screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from experiments.report.looks import Look

RADIUS = 8.5
CHAR, BOLD = 6.4, 8.7
"""Mean width of a character, plain and bold, in user units; for wide fonts."""


@dataclass(frozen=True)
class Scale:
    """Maps values to positions; logarithmic where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round values within the scale, about `count` of them."""
        return log_ticks(self.low, self.high) if self.log else nice_ticks(
            self.low, self.high, count
        )  # fmt: skip


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return multiples of 1, 2, 2.5 or 5 times a power of ten from `low` to `high`.

    >>> nice_ticks(0, 41)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within the range; with 2 and 5 between them where they are few.

    >>> log_ticks(5, 300)
    [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in ((1, 2, 5) if high < 200 * low else (1,))]
    return [tick for tick in found if low * 0.999 <= tick <= high * 1.001]


@dataclass
class Drawing:
    """Collects the elements of one picture."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, element: str) -> None:
        """Append an element."""
        self.parts.append(element)

    def line(
        self,
        points: Iterable[tuple[float, float]],
        look: Look,
        *,
        name: str = "",
        css: str = "line",
    ) -> None:
        """Draw a line in a look; `name` shows under the pointer."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{_joined(look.pattern)}"' if look.dash else ""
        self.add(f'<polyline class="{css} k{look.colour}"{dash} points="{path}">{_tip(name)}'
                 "</polyline>")  # fmt: skip

    def band(
        self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], look: Look
    ) -> None:
        """Fill between two lines."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *reversed(lower)))
        self.add(f'<polygon class="band k{look.colour}" points="{path}"/>')

    def dot(
        self, x: float, y: float, look: Look, *, radius: float = 3.0, name: str = "", css: str = ""
    ) -> None:
        """Draw a filled circle; a dashed look makes it a ring."""
        kind = "ring" if look.dash else "dot"
        self.add(f'<circle class="{kind} k{look.colour} {css}" cx="{x:.1f}" cy="{y:.1f}" '
                 f'r="{radius:g}">{_tip(name)}</circle>')  # fmt: skip

    def rule(self, a: tuple[float, float], b: tuple[float, float], css: str = "grid") -> None:
        """Draw a straight line of the given class."""
        self.add(f'<line class="{css}" x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" '
                 f'y2="{b[1]:.1f}"/>')  # fmt: skip

    def text(
        self, at: tuple[float, float], words: str, *, css: str = "", anchor: str = "start"
    ) -> None:
        """Write a line of text; `at` is where its baseline starts, ends or has its middle."""
        self.add(f'<text class="{css}" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">'
                 f"{escape(words)}</text>")  # fmt: skip

    def upright(self, middle: tuple[float, float], words: str) -> None:
        """Write an axis title that reads upwards."""
        self.add(f'<text class="axis" text-anchor="middle" transform="translate({middle[0]:.1f} '
                 f'{middle[1]:.1f}) rotate(-90)">{escape(words)}</text>')  # fmt: skip

    def disc(self, x: float, y: float, colour: int | str, *, name: str) -> None:
        """Draw a client on a map, in one of the page's colours or a fixed one."""
        how = f'style="fill:{colour}"' if isinstance(colour, str) else ""
        css = "" if isinstance(colour, str) else f" k{colour}"
        self.add(f'<circle class="client{css}" {how} cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS:g}">'
                 f"{_tip(name)}</circle>")  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float) -> None:
        """Draw the border of a plotting area."""
        self.add(f'<rect class="box" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')

    def svg(self) -> str:
        """Return the whole picture; readers that cannot see it get its title."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.title)}">' + "".join(self.parts) + "</svg>"
        )


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart with its two scales."""

    x: Scale
    y: Scale

    def draw_axes(
        self,
        drawing: Drawing,
        titles: tuple[str, str],
        write: tuple[Callable[[float], str], Callable[[float], str]],
    ) -> None:
        """Draw the grid lines, tick labels and axis titles: x below, y above the axis."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        for tick in self.y.ticks():
            at = self.y(tick)
            drawing.rule((left, at), (right, at), "base" if tick == self.y.low else "grid")
            drawing.text((left - 6, at + 4), write[1](tick), css="tick", anchor="end")
        for tick in _apart(self.x, self.x.ticks(4), write[0]):
            at = self.x(tick)
            drawing.rule((at, bottom), (at, bottom + 4), "base")
            drawing.text((at, bottom + 16), write[0](tick), css="tick", anchor="middle")
        drawing.text(((left + right) / 2, bottom + 32), titles[0], css="axis", anchor="middle")
        drawing.text((0, top - 10), titles[1], css="axis")


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are `gap` away, within `low` to `high`.

    Positions keep their order. Where all do not fit, they are spaced evenly.

    >>> spread([10, 11, 50], gap=10, low=0, high=100)
    [5.5, 15.5, 50.0]
    """
    if not wanted:
        return []
    if gap * (len(wanted) - 1) > high - low:
        gap = (high - low) / max(len(wanted) - 1, 1)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[float]] = []  # [sum of (wanted - offset), count]: blocks that touch
    for place in order:
        blocks.append([wanted[place], 1])
        while len(blocks) > 1 and _start(blocks[-2]) + gap * blocks[-2][1] > _start(blocks[-1]):
            total, count = blocks.pop()
            before = blocks[-1]
            before[0] += total - count * gap * before[1]
            before[1] += count
    placed: list[float] = []
    for block in blocks:
        count = int(block[1])
        start = min(max(_start(block), low), high - gap * (count - 1))
        if placed:
            start = max(start, placed[-1] + gap)
        placed += [start + gap * i for i in range(count)]
    result = [0.0] * len(wanted)
    for rank, (place, at) in enumerate(zip(order, placed, strict=True)):
        result[place] = min(at, high - gap * (len(order) - 1 - rank))
    return result


def cut(words: str, width: float) -> str:
    """Shorten a bold label to about a width in user units.

    >>> cut("MH-pFedHNGD", 62)
    'MH-pFe…'
    """
    fits = int(width / BOLD)
    return words if len(words) <= fits else words[: max(1, fits - 1)] + "…"


def _start(block: Sequence[float]) -> float:
    return block[0] / block[1]


def _apart(scale: Scale, ticks: Sequence[float], write: Callable[[float], str]) -> list[float]:
    """Drop ticks whose labels would touch the one before."""
    kept: list[float] = []
    for tick in ticks:
        room = CHAR * (len(write(tick)) + 2)
        if not kept or scale(tick) - scale(kept[-1]) >= room:
            kept.append(tick)
    return kept


def _tip(name: str) -> str:
    return f"<title>{escape(name)}</title>" if name else ""


def _joined(pattern: Sequence[float]) -> str:
    return " ".join(f"{length:g}" for length in pattern)
