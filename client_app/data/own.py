"""A participant's own pictures: a folder, or a function of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import OWN
from client_app.data.decode import ReadExample, decode_picture, picture_channels, resize_array
from client_app.data.source import Examples, file_identity
from client_app.plugins import load_callable
from common.errors import DataError, listing

PICTURE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip


@dataclass(frozen=True)
class FolderSource:
    """A participant's own pictures, in one folder for each class; classes in the order of names.

    Grey when every picture is, else RGB. Hidden files and folders are left out.
    """

    root: Path

    def fingerprint(self) -> list[Any]:
        """Return a hash of every picture's path, size and modification time."""
        facts = [file_identity(path) for paths in self._classes().values() for path in paths]
        return ["folder", str(self.root), hashlib.sha256(repr(facts).encode()).hexdigest()]

    def read(self, image_size: int) -> Examples:
        """Open the folder."""
        classes = self._classes()
        paths = [path for members in classes.values() for path in members]
        labels = np.repeat(np.arange(len(classes)), [len(m) for m in classes.values()])
        channels = max(picture_channels(_bytes(path)) for path in paths)

        def read_example(index: int) -> NDArray[np.uint8]:
            path = paths[index]
            return decode_picture(
                _bytes(path), channels=channels, image_size=image_size, name=str(path)
            )

        return _own_examples(labels.astype(np.int64), channels, read_example)

    def _classes(self) -> dict[str, list[Path]]:
        if not self.root.is_dir():
            raise DataError(
                f"data-dir {self.root} is not a folder. Give the absolute path of a folder that "
                "has one folder of pictures for each class."
            )
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        classes = {folder.name: _pictures(folder) for folder in folders}
        if len(classes) < 2:
            raise DataError(
                f"data-dir {self.root} must hold one folder of pictures for each of at least 2 "
                f"classes, found {len(classes)} ({listing(classes) or 'none'})."
            )
        for name, pictures in classes.items():
            if not pictures:
                raise DataError(
                    f"class folder {self.root / name} holds no pictures "
                    f"({', '.join(sorted(PICTURE_SUFFIXES))}). Add some or remove the folder."
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

    def fingerprint(self) -> list[Any]:
        """Return the identity of the module's file and of the files under data-dir."""
        try:
            module = importlib.util.find_spec(self.spec.partition(":")[0])
        except (ImportError, ValueError):
            module = None
        facts: list[Any] = ["function", self.spec]
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
        images, labels = np.asarray(images), np.asarray(labels)
        if fault := _fault(images, labels):
            raise DataError(f"dataset {self.spec!r}: {fault}.")
        pixels = images.reshape(*images.shape[:3], -1)
        return _own_examples(
            labels.astype(np.int64),
            pixels.shape[-1],
            lambda index: resize_array(pixels[index], image_size=image_size),
        )


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


def _pictures(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    return sorted(path for path in found if path.name[0] != ".")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _own_examples(labels: NDArray[np.int64], channels: int, read_example: ReadExample) -> Examples:
    num_classes = int(labels.max(initial=0)) + 1
    return Examples(labels, num_classes, OWN.mean * channels, OWN.std * channels, read_example)
