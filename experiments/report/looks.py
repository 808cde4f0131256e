"""One look for each method in every picture: a colour, and a dash where colours run out.

Eight colours whose smallest distance (OKLab, x 100) is at least 10 for normal sight and under
simulated deuteranopia and protanopia, and 8 under tritanopia, on white (LIGHT) and on near-black
(DARK). What is grey is the bar that others are measured by: Local.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LIGHT = (
    "#0068b0", "#d9560b", "#179876", "#540f41", "#6d4b00", "#4fa6d5", "#440090", "#59616c",
)  # fmt: skip
DARK = (
    "#4a9df0", "#ff8440", "#83ffd9", "#d53d84", "#f7c76f", "#1c89b4", "#715bda", "#b4bcc6",
)  # fmt: skip
GREY = 7
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (1.5, 3), (9, 3, 2, 3))
SCALE = ("#00204c", "#2b446e", "#575d6d", "#7d7c78", "#a69d75", "#d3c064", "#ffe945")
"""From little to much, told apart by lightness alone (sampled from the public cividis map)."""


@dataclass(frozen=True)
class Look:
    """An index into LIGHT and DARK, and one into DASHES."""

    colour: int
    dash: int

    @property
    def light(self) -> str:
        """The colour on white."""
        return LIGHT[self.colour]

    @property
    def pattern(self) -> tuple[float, ...]:
        """Lengths of the dashes and gaps; empty for a solid line."""
        return DASHES[self.dash]


METHOD_LOOKS = {
    "mh-pfedhn": Look(0, 0),
    "mh-pfedhn-gd": Look(1, 0),
    "local": Look(GREY, 1),
    "fedavg": Look(2, 0),
    "fedavg-ft": Look(2, 1),
    "fedprox": Look(2, 2),
    "lg-fedavg": Look(3, 0),
    "fedgh": Look(3, 1),
    "fedproto": Look(4, 0),
    "fedtgp": Look(4, 1),
    "fml": Look(5, 0),
    "fd": Look(5, 1),
    "pfedhn": Look(6, 0),
}


def looks_for(groups: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """Give each (key, method) a look: the first of a method its own, the others what is free.

    Past 28 groups the looks repeat; tables and labels still tell them apart.

    Returns
    -------
    {key: look}, the same for the same list.
    """
    found: dict[str, Look] = {}
    for key, method in groups:
        look = METHOD_LOOKS.get(method)
        if look and look not in found.values():
            found[key] = look
    free = _free({*found.values()})
    for place, (key, _) in enumerate(group for group in groups if group[0] not in found):
        found[key] = free[place % len(free)]
    return found


def family_looks(names: Sequence[str]) -> Mapping[str, Look]:
    """Give each architecture a colour, in the order of their first appearance."""
    unique = list(dict.fromkeys(names))
    return {name: Look(i % GREY, 0) for i, name in enumerate(unique)}


def scale_colour(share: float) -> str:
    """Return the colour of a number from 0 to 1 on the sequential scale.

    >>> scale_colour(0.0), scale_colour(1.0)
    ('#00204c', '#ffe945')
    """
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    pairs = zip(_rgb(SCALE[low]), _rgb(SCALE[low + 1]), strict=True)
    mixed = [round(a + (b - a) * (place - low)) for a, b in pairs]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _free(taken: set[Look]) -> list[Look]:
    every = [Look(colour, dash) for dash in range(len(DASHES)) for colour in range(GREY)]
    return [look for look in every if look not in taken] or every


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
