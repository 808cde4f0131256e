"""Data sets that say who or where an example is of, in the form in which their authors give them.

Both are read whole, whatever split their authors made: a group is one client's, and that client's
own examples are divided (method.md, "Data and evaluation").
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import CATALOGUE
from client_app.data.decode import decode_picture
from client_app.data.published import examples_of
from client_app.data.source import Division, Examples, file_identity
from common.errors import DataError, listing

HAR_HALVES = ("train", "test")
HAR_COLUMNS = 561


@dataclass(frozen=True)
class WildcamSource:
    """iWildCam as WILDS has it (arXiv 2012.07421): a table of pictures, and the pictures.

    A picture's group is its camera trap. Those of which the file is missing are left out, so that a
    part of the 12 GB can be used.
    """

    root: Path
    holds: ClassVar[str] = "metadata.csv and train/PICTURE.jpg (iwildcam_v2.0 of WILDS)"

    def fingerprint(self) -> list[Any]:
        """Return the identity of the table, and how many pictures there are."""
        return ["iwildcam", *map(file_identity, _there(self, "metadata.csv")), len(self._names())]

    def _names(self) -> set[str]:
        folder = self.root / "train"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def read(self, image_size: int) -> Examples:
        """Read the table; pictures are read one by one when they are decoded."""
        (path,), there = _there(self, "metadata.csv"), self._names()
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            missing = {"filename", "y", "location_remapped"} - set(table.fieldnames or ())
            if missing:
                raise DataError(f"{path} lacks the columns {listing(sorted(missing))}.")
            rows = [row for row in table if row["filename"] in there]
        if not rows:
            raise DataError(f"{path.parent}/train has none of the pictures that {path} names.")
        columns = {key: [row[key] for row in rows] for key in ("y", "location_remapped")}

        def read_example(index: int) -> NDArray[np.uint8]:
            picture = self.root / "train" / rows[index]["filename"]
            return decode_picture(
                picture.read_bytes(), channels=3, image_size=image_size, name=str(picture)
            )

        labels, traps = (_whole_numbers(column, path) for column in columns.values())
        found = examples_of(labels, len(rows), read_example, CATALOGUE["iwildcam"], where=str(path))
        return replace(found, division=Division.of(groups=traps))


@dataclass(frozen=True)
class HarSource:
    """Human activities as UCI has them: 561 columns computed from a phone's sensors.

    An example's group is the person who wore it.
    """

    root: Path
    holds: ClassVar[str] = (
        "train/X_train.txt, y_train.txt and subject_train.txt, and the same of test (UCI HAR)"
    )

    def fingerprint(self) -> list[Any]:
        """Return the identity of all six files."""
        return ["har", *(file_identity(path) for half in HAR_HALVES for path in self._files(half))]

    def _files(self, half: str) -> list[Path]:
        names = (f"{half}/{kind}_{half}.txt" for kind in ("X", "y", "subject"))
        return _there(self, *names)

    def read(self, image_size: int) -> Examples:
        """Read both halves into memory (22 MB); `image_size` means nothing to a table."""
        halves = [[_table(path) for path in self._files(half)] for half in HAR_HALVES]
        inputs, classes, people = (np.concatenate(parts) for parts in zip(*halves, strict=True))
        if inputs.shape[1] != HAR_COLUMNS or not len(inputs) == len(classes) == len(people):
            raise DataError(
                f"{self.root}: expected X of {HAR_COLUMNS} columns, and a line of y and subject "
                f"for each of its lines; got {inputs.shape}, {len(classes)} and {len(people)}."
            )
        values = inputs.astype(np.float32)
        found = examples_of(
            classes[:, 0].astype(np.int64) - 1,
            len(values),
            values.__getitem__,
            CATALOGUE["har"],
            where=str(self.root),
        )
        division = Division.of(groups=people[:, 0])
        return replace(found, shape=values.shape[1:], dtype=values.dtype, division=division)


NATURAL_SOURCES: dict[str, type[WildcamSource] | type[HarSource]] = {
    "iwildcam": WildcamSource,
    "har": HarSource,
}


def _there(source: WildcamSource | HarSource, *names: str) -> list[Path]:
    """Return files of a source, each of which has to exist."""
    paths = [source.root / name for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"data-dir {source.root} has no {missing[0]}: expected {source.holds}.")
    return paths


def _table(path: Path) -> NDArray[np.float64]:
    """Read lines of numbers, (lines, columns)."""
    return _numbers(lambda: np.loadtxt(path, ndmin=2), path)


def _whole_numbers(texts: list[str], path: Path) -> NDArray[np.int64]:
    return _numbers(lambda: np.array(texts, dtype=np.int64), path)


def _numbers(read: Callable[[], NDArray[Any]], path: Path) -> NDArray[Any]:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
