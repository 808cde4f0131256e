"""What a source of examples is: its fingerprint changes when its files do; it is read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

PARTS = ("train", "validation", "test")
"""What a source's own division may name, by number."""
CLASSES, LABELS, NUMBERS = TARGETS = "classes", "labels", "numbers"
"""What examples are labelled with: a class each, int64 (N,); several labels, each of them there or
not, bool (N, C); numbers, float32 (N, C)."""
ReadExample = Callable[[int], NDArray[Any]]


@dataclass(frozen=True)
class Division:
    """How a source wants its N examples divided; with none of these, at random.

    `parts` (N,) int8 says which of `PARTS` an example belongs to. `groups` (N,) int64 are kept
    together: all examples of a patient are trained on, or none. `times` (N,) float64 puts the
    latest into the test part, those before into the validation part.
    """

    parts: NDArray[np.int8] | None = None
    groups: NDArray[np.int64] | None = None
    times: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, *, groups: Any = None, times: Any = None) -> Self:
        """Number groups of any names; read times, numbers or numpy's datetimes."""
        if groups is not None:
            groups = np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
        if times is not None:
            times = np.asarray(times)
            if times.dtype.kind in "OU":
                times = np.array([_second(time) for time in times.tolist()])
            times = times.astype("datetime64[ns]") if times.dtype.kind == "M" else times
            times = times.astype(np.float64)
        return cls(groups=groups, times=times)

    def at(self, rows: NDArray[np.int64], *, keep_groups: bool) -> Division:
        """Return that of some examples (M,); whether groups are kept together there, or mixed."""
        found = {name: values[rows] for name, values in self.arrays().items()}
        return Division(**{k: v for k, v in found.items() if keep_groups or k != "groups"})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def fault(self, count: int) -> str:
        """Say what is wrong with it for so many examples; "" when nothing is."""
        found = self.arrays()
        if len(found) > 1:
            return f"{' and '.join(found)} together; give one of them"
        for name, values in found.items():
            if values.shape != (count,):
                return f"{name} {values.shape} must have one entry for each of {count} examples"
            if not np.isfinite(values).all():
                return f"{name} has an entry that is no finite number"
            if name != "parts" and len(np.unique(values)) < 2:
                return f"{name} are all the same: nothing can be held back"
        return ""


def _second(time: Any) -> float:
    """Return the second of a datetime, of pandas too, or of an ISO text."""
    try:
        when = datetime.fromisoformat(time) if isinstance(time, str) else time
        return float(when.timestamp())
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"times have {time!r:.60}; expected numbers, datetimes, or texts as 2024-01-31"
        ) from error


@dataclass(frozen=True)
class Examples:
    """All examples of a source; mean and std for each channel, of 0 to 1.

    Labels are of one of `TARGETS`, `num_classes` counts a model's outputs.
    `read_example` decodes one, by its index, to uint8 (channels, image_size, image_size); it is
    safe to call from several threads. Without a mean, examples are no pictures: they have `shape`
    and `dtype`, and a model gets them as they are. `about` are JSON-able facts that go with a model
    of these data: `class_names` in their order, `intensity` (what became 0 and 255 of pictures),
    `values` (the least and the largest of pictures with more than 8 bits), and `left_out`, files
    that are no pictures, by ending.
    """

    labels: NDArray[Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read_example: ReadExample
    about: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    division: Division = field(default_factory=Division)


class Source(Protocol):
    """A place that examples and labels come from."""

    def fingerprint(self) -> list[Any]:
        """Return JSON-able facts that differ when the content may differ; cheap."""

    def read(self, image_size: int) -> Examples:
        """Open the source; raise DataError when it does not hold what it should."""


def file_identity(path: Path) -> list[Any]:
    """Return path, size and modification time: what tells that a file has changed."""
    facts = path.stat()
    return [str(path), facts.st_size, facts.st_mtime_ns]
