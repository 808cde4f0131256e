"""A participant's own pictures: a folder, or a function of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import OWN
from client_app.data.decode import (
    Intensity,
    ReadExample,
    decode_picture,
    picture_kind,
    picture_range,
    resize_array,
)
from client_app.data.source import Examples, file_identity
from client_app.plugins import load_callable
from common.errors import DataError, listing

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
NOT_MINE = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db"}
"""What systems and appliances put beside one's files; and all that begins with a dot."""


@dataclass(frozen=True)
class FolderSource:
    """A participant's own pictures, in one folder for each class.

    Classes are `class_names` in their order, of which the folder may lack some; () means the names
    of the folders, in order. Grey when every picture is, else RGB; pictures with more than 8 bits
    are scaled alike, from the least to the largest value of all. Names are compared in Unicode's
    form NFC. Hidden files and folders are left out, at every depth.
    """

    root: Path
    class_names: tuple[str, ...] = ()

    def fingerprint(self) -> list[Any]:
        """Return a hash of every picture's path, size and modification time."""
        facts = [file_identity(path) for paths in self.pictures().values() for path in paths]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        return ["folder", str(self.root), list(self.class_names), digest]

    def read(self, image_size: int) -> Examples:
        """Open the folder."""
        classes, left_out = self.pictures(), self._left_out()
        paths = [path for members in classes.values() for path in members]
        labels = np.repeat(np.arange(len(classes)), [len(m) for m in classes.values()])
        kinds = [picture_kind(_bytes(path)) for path in paths]
        channels, intensity = max(count for count, _ in kinds), _intensity(paths, kinds)
        about: dict[str, Any] = {"class_names": list(classes), "left_out": left_out}
        if intensity:
            about["intensity"] = list(intensity)
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

        return _own_examples(labels.astype(np.int64), len(classes), channels, read_example, about)

    def _left_out(self) -> dict[str, int]:
        """Count the files below class folders that are no pictures, by their ending."""
        files = (path for folder in self._folders().values() for path in _files(folder))
        others = (path.suffix.lower() for path in files)
        return dict(Counter(s or "without" for s in others if s not in PICTURE_SUFFIXES))

    def _folders(self) -> dict[str, Path]:
        """Return the class folders by name, in order; raise DataError where two have one name."""
        if not self.root.is_dir():
            raise DataError(
                f"data-dir {self.root} is not a folder. Give the absolute path of a folder that "
                "has one folder of pictures for each class."
            )
        found = [p for p in self.root.iterdir() if p.is_dir() and _is_mine(p.name)]
        named = {unicodedata.normalize("NFC", p.name): p for p in sorted(found)}
        if len(named) < len(found):
            raise DataError(
                f"data-dir {self.root} has two folders whose names look alike and are written "
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
            classes = {n: pictures_below(folders[n]) if n in folders else [] for n in names}
            if not any(classes.values()):
                raise DataError(f"data-dir {self.root} holds no picture of {listing(names, 20)}.")
            return classes
        classes = {name: pictures_below(folder) for name, folder in folders.items()}
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


@dataclass(frozen=True)
class FunctionSource:
    """A participant's own function() -> (images uint8 (N, H, W[, channels]), labels (N,)).

    The decoded result is kept until the file that defines the function changes, or any file under
    data-dir when that is set: name there the folder that the function reads.
    """

    spec: str
    data_dir: str
    class_names: tuple[str, ...] = ()

    def fingerprint(self) -> list[Any]:
        """Return the identity of the module's file and of the files under data-dir."""
        try:
            module = importlib.util.find_spec(self.spec.partition(":")[0])
        except (ImportError, ValueError):
            module = None
        facts: list[Any] = ["function", self.spec, list(self.class_names)]
        if module is not None and module.origin and os.path.isfile(module.origin):
            facts.append(file_identity(Path(module.origin)))
        if self.data_dir:
            root = Path(self.data_dir).expanduser().resolve()
            facts += [file_identity(path) for path in sorted(root.rglob("*")) if path.is_file()]
        return facts

    def read(self, image_size: int) -> Examples:
        """Call the function and check what it returned."""
        function = load_callable(
            self.spec, key="dataset", error=DataError, example="my_data:load_scans"
        )
        try:
            images, labels = function()
        except Exception as cause:  # a participant's code may raise anything; name whose it was
            raise DataError(
                f"dataset {self.spec!r} must return (images, labels) when called without "
                f"arguments; it raised {type(cause).__name__}: {cause}"
            ) from cause
        _require_one_size(images, self.spec)
        images, labels = np.asarray(images), np.asarray(labels)
        if fault := _fault(images, labels):
            raise DataError(f"dataset {self.spec!r}: {fault}.")
        pixels = images.reshape(*images.shape[:3], -1)
        num_classes, names = int(labels.max(initial=0)) + 1, self.class_names
        if names and num_classes > len(names):
            raise DataError(
                f"dataset {self.spec!r}: a label is {num_classes - 1}, but class-names has "
                f"{len(names)} names: {listing(names, 20)}. Labels count from 0."
            )
        return _own_examples(
            labels.astype(np.int64),
            len(names) or num_classes,
            pixels.shape[-1],
            lambda index: resize_array(pixels[index], image_size=image_size),
            {"class_names": list(names)} if names else {},
        )


def _require_one_size(images: Any, spec: str) -> None:
    """Raise DataError where a list of pictures has several sizes, which numpy cannot stack."""
    if isinstance(images, np.ndarray) and images.dtype != object:
        return
    sizes = Counter(np.asarray(one).shape for one in images)
    if len(sizes) > 1:
        raise DataError(
            f"dataset {spec!r}: pictures have {len(sizes)} sizes, "
            f"{listing(map(str, sizes), 5)}. Resize them to one (PIL's Image.resize), or pad them."
        )


def _intensity(paths: list[Path], kinds: list[tuple[int, bool]]) -> Intensity | None:
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


def _fault(images: NDArray[Any], labels: NDArray[Any]) -> str:
    """Say what is wrong with what a participant's function returned; "" when nothing is."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        return (
            "images must be uint8 (N, H, W) or (N, H, W, channels), "
            f"got {images.dtype} {images.shape}"
        )
    if not images.size:
        return f"it returned no images: {images.shape}"
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        return (
            f"images {images.shape} look like (N, channels, H, W); channels come last: "
            "np.moveaxis(images, 1, -1)"
        )
    whole = np.issubdtype(labels.dtype, np.integer)
    if labels.shape != (len(images),) or not whole or labels.min(initial=0) < 0:
        return (
            f"labels must be integers from 0, one for each of the {len(images)} images, "
            f"got {labels.dtype} {labels.shape}"
        )
    return ""


def _is_mine(name: str) -> bool:
    return name[0] != "." and name not in NOT_MINE


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are the participant's own, at every depth."""
    for path in folder.rglob("*"):
        if all(map(_is_mine, path.relative_to(folder).parts)) and path.is_file():
            yield path


def pictures_below(folder: Path) -> list[Path]:
    """Return the pictures in a folder, at every depth, in order of their names."""
    return sorted(path for path in _files(folder) if path.suffix.lower() in PICTURE_SUFFIXES)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _own_examples(
    labels: NDArray[np.int64],
    num_classes: int,
    channels: int,
    read_example: ReadExample,
    about: Mapping[str, Any],
) -> Examples:
    mean, std = OWN.mean * channels, OWN.std * channels
    return Examples(labels, num_classes, mean, std, read_example, about)
