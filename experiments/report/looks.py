"""One look for each method in every picture: a colour, and a dash where colours run out.

Eight colours whose smallest distance (OKLab, x 100) is at least 10 for normal sight and under
simulated deuteranopia and protanopia, and 8 under tritanopia, on white (LIGHT) and on near-black
(page.css has those). What is grey is the bar that others are measured by: Local.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.methods import METHODS

LIGHT = (
    "#0068b0", "#d9560b", "#179876", "#540f41", "#6d4b00", "#4fa6d5", "#440090", "#59616c",
)  # fmt: skip
GREY = 7
DASHES: tuple[tuple[float, ...], ...] = ((), (3, 1.5), (0.75, 1.5), (4.5, 1.5, 1, 1.5))
"""In line widths."""


class Look(NamedTuple):
    """An index into LIGHT, and one into DASHES."""

    colour: int
    dash: int

    @property
    def light(self) -> str:
        """The colour on white."""
        return LIGHT[self.colour]


def looks_for(groups: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """Give each (key, method) a look: the first of a method its own, the others what is free.

    Past 28 groups the looks repeat; tables and labels still tell them apart.
    """
    found: dict[str, Look] = {}
    for key, method in groups:
        if method in METHODS and (look := Look(*METHODS[method].look)) not in found.values():
            found[key] = look
    every = [Look(colour, dash) for dash in range(len(DASHES)) for colour in range(GREY)]
    free = [look for look in every if look not in found.values()] or every
    for place, (key, _) in enumerate(group for group in groups if group[0] not in found):
        found[key] = free[place % len(free)]
    return found


def family_looks(names: Sequence[str]) -> dict[str, Look]:
    """Give each architecture a colour, in the order of their first appearance."""
    return {name: Look(i % GREY, 0) for i, name in enumerate(dict.fromkeys(names))}


def method_label(method: str) -> str:
    """Return what tables and pictures call a method, which this version need not know."""
    return METHODS[method].label if method in METHODS else method
