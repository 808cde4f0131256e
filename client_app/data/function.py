"""A participant's own function: pictures or tensors of any shape, and how they are divided.

Shapes: N examples.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import OWN
from client_app.data.decode import Intensity, require_spread, resize_array, scaled
from client_app.data.labels import read_labels
from client_app.data.returned import table_of
from client_app.data.several import packed
from client_app.data.source import Examples, file_identity
from client_app.plugins import load_callable
from common.errors import DataError, listing

MOST_CHANNELS = 4
_SOME = 256


@dataclass(frozen=True)
class FunctionSource:
    """A participant's own function(), which returns one of `FORMS`.

    Inputs are pictures, uint8 (N, H, W[, channels]), or of any numbers where there is an
    `intensity`, which are scaled to the run's size; or floats or token ids (N, ...), which a model
    gets as they are, or a dict of several of these. Labels are classes, integers (N,) from 0; or
    several labels, bool (N, C); or numbers, floats (N[, C]).

    The result is kept until the file that defines the function changes, or any file under data-dir
    when that is set: name there the folder that the function reads.
    """

    spec: str
    data_dir: str
    class_names: tuple[str, ...] = ()
    intensity: Intensity | None = None

    def fingerprint(self) -> list[Any]:
        """Return the identity of the module's file and of the files under data-dir."""
        try:
            module = importlib.util.find_spec(self.spec.partition(":")[0])
        except (ImportError, ValueError):
            module = None
        facts: list[Any] = ["function", self.spec, list(self.class_names)]
        facts += [list(self.intensity)] if self.intensity else []
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
            table = table_of(function())
        except DataError as cause:
            raise DataError(f"dataset {self.spec!r}: {cause}") from cause
        except Exception as cause:  # a participant's code may raise anything; name whose it was
            raise DataError(
                f"dataset {self.spec!r}, called without arguments, raised "
                f"{type(cause).__name__}: {cause} (line {line_of(cause)})"
            ) from cause
        try:
            inputs, parts = packed(table.inputs)
            labels = read_labels(table.labels, len(inputs), table.target)
            values = None
            if self.intensity:
                inputs, values = _as_pictures(inputs, self.intensity)
        except DataError as error:
            raise DataError(f"dataset {self.spec!r}: {error}.") from error
        if fault := _wrong_inputs(inputs) or table.division.fault(len(inputs)):
            raise DataError(f"dataset {self.spec!r}: {fault}.")
        num_classes = self._num_classes(labels)
        about: dict[str, Any] = {"inputs": parts} if parts else {}
        if self.class_names:
            about["class_names"] = list(self.class_names)
        if self.intensity:
            about["intensity"] = list(self.intensity)
        if values:
            about["values"] = list(values)
        if inputs.dtype != np.uint8:
            same = _as_they_are(inputs)
            return Examples(
                labels, num_classes, (), (), same.__getitem__, about,
                same.shape[1:], same.dtype, table.division,
            )  # fmt: skip
        pixels = inputs.reshape(*inputs.shape[:3], -1)
        channels = pixels.shape[-1]
        return Examples(
            labels,
            num_classes,
            OWN.mean * channels,
            OWN.std * channels,
            lambda index: resize_array(pixels[index], image_size=image_size),
            about,
            division=table.division,
        )

    def _num_classes(self, labels: NDArray[Any]) -> int:
        names = self.class_names
        if labels.ndim > 1:
            if names and len(names) != labels.shape[1]:
                raise DataError(
                    f"dataset {self.spec!r}: labels {labels.shape} have {labels.shape[1]} columns, "
                    f"class-names has {len(names)} names: {listing(names, 20)}."
                )
            return int(labels.shape[1])
        count = int(labels.max(initial=0)) + 1
        if names and count > len(names):
            raise DataError(
                f"dataset {self.spec!r}: a label is {count - 1}, but class-names has "
                f"{len(names)} names: {listing(names, 20)}. Labels count from 0."
            )
        return len(names) or count


def line_of(cause: Exception) -> str:
    """Return file and line of the last of a participant's own lines that an error passed."""
    here = Path(__file__).parents[2]
    frames = [
        f for f in traceback.extract_tb(cause.__traceback__) if "site-packages" not in f.filename
    ]
    own = [frame for frame in frames if here not in Path(frame.filename).parents] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def _as_pictures(
    inputs: NDArray[Any], intensity: Intensity
) -> tuple[NDArray[np.uint8], Intensity | None]:
    """Scale arrays (N, H, W[, channels]) of any numbers to uint8; also return least and largest.

    Of uint8 None stands for these two. Raises DataError where they are no pictures.
    """
    if inputs.dtype.kind not in "uif" or inputs.ndim not in (3, 4) or not inputs.size:
        raise DataError(
            f"intensity says how pictures (N, H, W) or (N, H, W, channels) are scaled; inputs are "
            f"{inputs.dtype} {inputs.shape}. Leave it out, or return pictures"
        )
    values = float(inputs.min()), float(inputs.max())  # of NaN both are NaN
    if not np.isfinite(values).all():
        raise DataError("a picture has a value that is no finite number. Mend or drop it")
    found = None if inputs.dtype == np.uint8 else values
    try:
        require_spread(intensity, found)
    except DataError as error:
        raise DataError(str(error).removesuffix(".")) from error
    pixels = np.empty(inputs.shape, np.uint8)
    for start in range(0, len(inputs), _SOME):  # floats of all of them would fill the memory
        pixels[start : start + _SOME] = scaled(inputs[start : start + _SOME], intensity)
    return pixels, found


def _as_they_are(inputs: NDArray[Any]) -> NDArray[Any]:
    """Return floats as float32, whole numbers as int64."""
    whole = np.issubdtype(inputs.dtype, np.integer)
    return np.ascontiguousarray(inputs, np.int64 if whole else np.float32)


def _first_text(inputs: NDArray[Any]) -> str:
    for column, values in enumerate(inputs.reshape(len(inputs), -1).T):
        for value in values:
            if isinstance(value, str):
                return f"{value[:40]!r} in column {column}"
    return "no text, but objects: astype says which"


def _wrong_inputs(inputs: NDArray[Any]) -> str:
    dtype, shape = inputs.dtype, inputs.shape
    if dtype.kind in "OUS" and inputs.ndim > 1:
        return (
            f"inputs are {dtype} {shape}, with {_first_text(inputs)}. Encode words as numbers "
            "(pandas.get_dummies), then: inputs.astype('float32')"
        )
    if dtype.kind not in "uifb" or inputs.ndim < 2:
        return (
            f"inputs are {dtype} {shape}; expected pictures, uint8 (N, H, W) or (N, H, W, "
            "channels), or numbers (N, ...): a table float32 (N, columns)"
        )
    if not inputs.size:
        return f"it returned no examples: {shape}"
    if dtype == np.uint8:
        if inputs.ndim not in (3, 4):
            return (
                f"pictures must be uint8 (N, H, W) or (N, H, W, channels), got {shape}; a table "
                "is float32 (N, columns): inputs.astype('float32')"
            )
        if (
            inputs.ndim == 4
            and shape[3] > MOST_CHANNELS
            and (shape[1] < shape[3] or shape[2] == shape[3])
        ):
            return (
                f"images {shape} look like (N, channels, H, W); channels come last: "
                "np.moveaxis(images, 1, -1). Volumes, and pictures of more channels, are floats: "
                "(inputs / 255).astype('float32'), as (N, channels, ...)"
            )
        return ""
    if dtype.kind in "iu" and (inputs.ndim > 2 or int(inputs.min()) < 0):
        return (
            f"inputs are {dtype} {shape}: whole numbers are token ids, (N, T) from 0. Pictures are "
            "uint8, or have an intensity, as '0..4095', or are floats with channels first: "
            "inputs[:, None].astype('float32')"
        )
    if inputs.ndim == 4 and shape[3] <= MOST_CHANNELS < shape[1]:
        return (
            f"inputs {dtype} {shape} look like pictures (N, H, W, channels). Set intensity to the "
            "range that they lie in, as '0..1', or return them as uint8, 0 to 255, to have them "
            "scaled and normalised; or channels first, to have them as they are: "
            "np.moveaxis(inputs, -1, 1)"
        )
    if dtype.kind == "f" and not np.isfinite(inputs).all():
        return "an input is no finite number (NaN or infinite). Fill or drop what is missing"
    return ""
