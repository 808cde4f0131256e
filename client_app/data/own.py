"""A participant's own pictures: a folder that has one folder for each class."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import OWN
from client_app.data.decode import (
    Intensity,
    decode_picture,
    picture_kind,
    picture_range,
    require_spread,
)
from client_app.data.source import PARTS, Division, Examples, file_identity
from common.errors import DataError, listing

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
NOT_MINE = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db"}
"""What systems and appliances put beside one's files; and all that begins with a dot."""
BROKEN = "links that lead nowhere"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Folders that divide a participant's pictures, above the folders of their classes."""


@dataclass(frozen=True)
class FolderSource:
    """A participant's own pictures, in one folder for each class.

    Classes are `class_names` in their order, of which the folder may lack some; () means the names
    of the folders, in order. Grey when every picture is, else RGB; all are scaled by `intensity`,
    or those with more than 8 bits from the least to the largest value of all. Names are compared in
    Unicode's form NFC. Hidden files and folders are left out, at every depth.

    Where the folders are train, test and perhaps val instead, each with the folders of the classes,
    the pictures are divided like that.
    """

    root: Path
    class_names: tuple[str, ...] = ()
    intensity: Intensity | None = None

    def fingerprint(self) -> list[Any]:
        """Return a hash of every picture's path, size and modification time."""
        facts = [file_identity(path) for paths in self.pictures().values() for path in paths]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        scale = [list(self.intensity)] if self.intensity else []
        return ["folder", str(self.root), list(self.class_names), digest, *scale]

    def read(self, image_size: int) -> Examples:
        """Open the folder."""
        classes, left_out = self.pictures(), self._left_out()
        pairs = [(path, n) for n, members in enumerate(classes.values()) for path in members]
        # by path, whatever the order of class-names: a server must not say who is held back
        pairs.sort(key=lambda pair: unicodedata.normalize("NFC", str(pair[0])))
        paths, labels = zip(*pairs, strict=True)
        kinds = [picture_kind(_bytes(path)) for path in paths]
        channels, values = max(count for count, _ in kinds), _values(paths, kinds)
        intensity = self.intensity or values
        about: dict[str, Any] = {"class_names": list(classes), "left_out": left_out}
        if intensity:
            require_spread(intensity, values)
            about["intensity"] = list(intensity)
        if values:
            about["values"] = list(values)
        if left_out:
            log.warning("%s: not read, for they are no pictures: %s", self.root, listed(left_out))

        def read_example(index: int) -> NDArray[np.uint8]:
            path = paths[index]
            return decode_picture(
                _bytes(path),
                channels=channels,
                image_size=image_size,
                name=str(path),
                intensity=intensity,
            )

        return Examples(
            np.array(labels, np.int64), len(classes), OWN.mean * channels, OWN.std * channels,
            read_example, about, division=self._division(paths),
        )  # fmt: skip

    def _division(self, paths: Sequence[Path]) -> Division:
        """Say which part each picture is in, where the folders do."""
        if self._roots() == [self.root]:
            return Division()
        names = [SPLITS[path.relative_to(self.root).parts[0].lower()] for path in paths]
        return Division(parts=np.array([PARTS.index(name) for name in names], np.int8))

    def _left_out(self) -> dict[str, int]:
        """Count the files below class folders that are no pictures, by their ending."""
        folders = itertools.chain.from_iterable(self._folders().values())
        files = (path for folder in folders for path in _files(folder))
        others = (path.suffix.lower() if path.exists() else BROKEN for path in files)
        return dict(Counter(s or "without" for s in others if s not in PICTURE_SUFFIXES))

    def _roots(self) -> list[Path]:
        """Return the folders that have the class folders: one for each part, or the root alone."""
        if not self.root.is_dir():
            raise DataError(
                f"data-dir {self.root} is not a folder. Give the absolute path of a folder that "
                "has one folder of pictures for each class."
            )
        found = _subfolders(self.root)
        parts = {path: SPLITS.get(path.name.lower(), "") for path in found}
        if "train" not in parts.values():
            return [self.root]
        if {"train", "test"} <= {*parts.values()} <= set(PARTS):
            return found  # whatever classes a server has names for
        here = listing(path.name for path in found)
        raise DataError(
            f"data-dir {self.root} has {here}: with train there must be test (held back, never "
            "trained on) and perhaps val, and nothing else. Rename what is held back to test, move "
            "the rest elsewhere; a class with such a name, too."
        )

    def _folders(self) -> dict[str, list[Path]]:
        """Return the folders of each class, in order; raise DataError where two have one name."""
        named: dict[str, list[Path]] = {}
        for root in self._roots():
            found = _subfolders(root)
            for path in found:
                named.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
            if len({unicodedata.normalize("NFC", path.name) for path in found}) < len(found):
                raise DataError(
                    f"data-dir {root} has two folders whose names look alike and are written "
                    f"differently (Unicode): {listing(sorted(p.name for p in found))}. Merge them."
                )
        return dict(sorted(named.items()))

    def pictures(self) -> dict[str, list[Path]]:
        """Return the pictures of every class, in the order of the classes."""
        folders = self._folders()
        if self.class_names:
            names = [unicodedata.normalize("NFC", name) for name in self.class_names]
            if strange := [name for name in folders if name not in names]:
                raise DataError(
                    f"data-dir {self.root}: {listing(strange)} is no class of this federation, "
                    f"whose class-names are {listing(names, 20)}. Rename the folder, or move it "
                    "elsewhere."
                )
            classes = {name: pictures_below(*folders.get(name, [])) for name in names}
            if not any(classes.values()):
                raise DataError(f"data-dir {self.root} holds no picture of {listing(names, 20)}.")
            return classes
        classes = {name: pictures_below(*found) for name, found in folders.items()}
        if len(classes) < 2:
            raise DataError(
                f"data-dir {self.root} must hold one folder of pictures for each of at least 2 "
                f"classes, found {len(classes)} ({listing(classes) or 'none'}). Where others have "
                "classes that are not here, set class-names to all of them."
            )
        for name, pictures in classes.items():
            if not pictures:
                raise DataError(
                    f"class folder {self.root / name} holds no pictures "
                    f"({', '.join(sorted(PICTURE_SUFFIXES))}). Add some, remove the folder, or set "
                    "class-names where others have this class."
                )
        return classes


def _values(paths: Sequence[Path], kinds: list[tuple[int, bool]]) -> Intensity | None:
    """Return the least and the largest value of all pictures, None where all have 8 bits."""
    deep = [path for path, (_, has_more) in zip(paths, kinds, strict=True) if has_more]
    if not deep:
        return None
    if len(deep) < len(paths):
        plain = next(path for path in paths if path not in set(deep))
        raise DataError(
            f"{deep[0]} has more than 8 bits and {plain} has 8: they have no common scale. Convert "
            "all pictures to one kind."
        )
    ranges = [picture_range(_bytes(path), str(path)) for path in deep]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low == high:
        raise DataError(f"{paths[0].parent.parent}: every pixel of every picture is {low:g}.")
    return low, high


def listed(counts: Mapping[str, int]) -> str:
    """Write counts by name.

    >>> listed({".heic": 5, ".txt": 1})
    '5 .heic, 1 .txt'
    """
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _is_mine(name: str) -> bool:
    return name[0] != "." and name not in NOT_MINE


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are the participant's own, at every depth."""
    seen = set[Path]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        folders[:] = [name for name in folders if _is_mine(name) and real not in seen]
        yield from (Path(place) / name for name in names if _is_mine(name) and real not in seen)
        seen.add(real)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_mine(path.name))


def pictures_below(*folders: Path) -> list[Path]:
    """Return the pictures in folders, at every depth, in order of their names."""
    files = itertools.chain.from_iterable(map(_files, folders))
    return sorted(
        path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
