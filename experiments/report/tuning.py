"""What a sweep's trials have reached, on validation examples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from experiments.report.runs import Run


def are_done(folders: Iterable[Path]) -> bool:
    """Whether all trials have completed."""
    return all(Run.read(folder).status == "completed" for folder in folders)


def reached(folder: Path) -> float:
    """Return a trial's accuracy in its last evaluated round; -1 where it has none."""
    found = [row["accuracy_micro"] for row in Run.read(folder).rows if "accuracy_micro" in row]
    return found[-1] if found and math.isfinite(found[-1]) else -1.0
