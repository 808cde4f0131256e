"""What a source of pictures is: its fingerprint changes when its files do; it is read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client_app.data.decode import ReadExample


@dataclass(frozen=True)
class Examples:
    """All examples of a source: labels (N,) int64; mean and std for each channel, of 0 to 1.

    `read_example` decodes one, by its index, to uint8 (channels, image_size, image_size); it is
    safe to call from several threads. `about` are JSON-able facts that go with a model of these
    data: `class_names` in their order, `intensity` (what became 0 and 255 of pictures with more
    than 8 bits), and `left_out`, files that are no pictures, by ending.
    """

    labels: NDArray[np.int64]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read_example: ReadExample
    about: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A place that pictures and labels come from."""

    def fingerprint(self) -> list[Any]:
        """Return JSON-able facts that differ when the content may differ; cheap."""

    def read(self, image_size: int) -> Examples:
        """Open the source; raise DataError when it does not hold what it should."""


def file_identity(path: Path) -> list[Any]:
    """Return path, size and modification time: what tells that a file has changed."""
    facts = path.stat()
    return [str(path), facts.st_size, facts.st_mtime_ns]
