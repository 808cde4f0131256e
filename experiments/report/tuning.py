"""Settings chosen on validation examples: what a sweep's trials reached, and what follows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.errors import RunError
from experiments.report.runs import Run

if TYPE_CHECKING:
    from experiments.report.plan import Cell, Settings


def are_done(cells: Iterable[Cell]) -> bool:
    """Whether all trials have completed."""
    return all(Run.read(cell.folder).status == "completed" for cell in cells)


def best_settings(cells: Iterable[Cell], variant: str) -> Settings:
    """Return the grid values of a variant's trial with the highest accuracy in its last round.

    Of equal ones the first. Raises RunError where it has none.
    """
    mine = [cell for cell in cells if cell.variant == variant]
    if not mine:
        raise RunError(f"variant {variant!r} has no trial.")
    return max(mine, key=reached).grid


def reached(cell: Cell) -> float:
    """Return a trial's accuracy in its last round, on validation examples; -1 where it has none."""
    found = [row["accuracy_micro"] for row in Run.read(cell.folder).rows if "accuracy_micro" in row]
    return found[-1] if found and math.isfinite(found[-1]) else -1.0
