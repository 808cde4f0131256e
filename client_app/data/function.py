"""A participant's own function: pictures or tensors of any shape, and how they are divided.

Shapes: N examples.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import OWN
from client_app.data.decode import resize_array
from client_app.data.labels import read_labels
from client_app.data.several import packed
from client_app.data.source import PARTS, Division, Examples, file_identity
from client_app.plugins import load_callable
from common.errors import DataError, listing

FORMS = (
    "(inputs, labels); or a torch Dataset of such pairs; or a dict of train, test and perhaps "
    "validation with one of these each; or a dict of inputs, labels and groups or times"
)
ALSO = {"groups", "times", "target"}
"""What may stand beside inputs and labels."""
MOST_CHANNELS = 4


class Table(NamedTuple):
    """What a function returned: inputs (N, ...) or several by name, labels, how they are divided.

    `target` is what it says that labels are; "": as their type says.
    """

    inputs: Any
    labels: Any
    division: Division
    target: str = ""


@dataclass(frozen=True)
class FunctionSource:
    """A participant's own function(), which returns one of `FORMS`.

    Inputs are pictures, uint8 (N, H, W[, channels]), which are scaled to the run's size; or floats
    or token ids (N, ...), which a model gets as they are, or a dict of several of these. Labels are
    classes, integers (N,) from 0; or several labels, bool (N, C); or numbers, floats (N[, C]).

    The result is kept until the file that defines the function changes, or any file under data-dir
    when that is set: name there the folder that the function reads.
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
            table = _table(function())
        except DataError as cause:
            raise DataError(f"dataset {self.spec!r}: {cause}") from cause
        except Exception as cause:  # a participant's code may raise anything; name whose it was
            raise DataError(
                f"dataset {self.spec!r} must return {FORMS}, when called without arguments; it "
                f"raised {type(cause).__name__}: {cause}"
            ) from cause
        try:
            inputs, parts = packed(table.inputs)
            labels = read_labels(table.labels, len(inputs), table.target)
        except DataError as error:
            raise DataError(f"dataset {self.spec!r}: {error}.") from error
        if fault := _wrong_inputs(inputs) or table.division.fault(len(inputs)):
            raise DataError(f"dataset {self.spec!r}: {fault}.")
        num_classes = self._num_classes(labels)
        about: dict[str, Any] = {"inputs": parts} if parts else {}
        if self.class_names:
            about["class_names"] = list(self.class_names)
        if inputs.dtype != np.uint8:
            values = _as_they_are(inputs)
            return Examples(
                labels, num_classes, (), (), values.__getitem__, about,
                values.shape[1:], values.dtype, table.division,
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


def _table(found: Any) -> Table:
    """Bring what a function returned into one form; raise DataError where it is none of `FORMS`."""
    if not isinstance(found, Mapping):
        return Table(*_pair(found), Division())
    keys = set(found)
    if {"train", "test"} <= keys <= set(PARTS):
        pairs = {name: _pair(found[name]) for name in PARTS if name in found}
        parts = [np.full(len(y), PARTS.index(name), np.int8) for name, (_, y) in pairs.items()]
        return Table(
            _joined([x for x, _ in pairs.values()]),
            np.concatenate([y for _, y in pairs.values()]),
            Division(parts=np.concatenate(parts)),
        )
    if {"inputs", "labels"} <= keys <= {"inputs", "labels", *ALSO}:
        inputs, labels = _pair((found["inputs"], found["labels"]))
        division = Division.of(groups=found.get("groups"), times=found.get("times"))
        return Table(inputs, labels, division, str(found.get("target", "")))
    raise DataError(f"it returned a dict of {listing(sorted(map(str, keys)), 8)}; expected {FORMS}")


def _pair(found: Any) -> tuple[Any, Any]:
    """Return inputs and labels of a pair, or of a torch Dataset, example by example."""
    if hasattr(found, "__getitem__") and hasattr(found, "__len__"):
        if not isinstance(found, (tuple, list)):
            found = tuple(zip(*(found[index] for index in range(len(found))), strict=True))
        if len(found) == 2:
            inputs, labels = found
            return _stacked(inputs), np.asarray(labels)
    raise DataError(f"it returned a {type(found).__name__}; expected {FORMS}")


def _stacked(inputs: Any) -> Any:
    """Return inputs as one array, or as a dict of arrays where an example has several."""
    if isinstance(inputs, Mapping):
        return {str(name): _stacked(values) for name, values in inputs.items()}
    if not hasattr(inputs, "dtype") and len(inputs) and isinstance(inputs[0], Mapping):
        return {str(name): _stacked([one[name] for one in inputs]) for name in inputs[0]}
    _require_one_shape(inputs)
    return np.asarray(inputs)


def _joined(parts: list[Any]) -> Any:
    """Put the inputs of several parts one after the other."""
    if not isinstance(parts[0], dict):
        return np.concatenate(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _require_one_shape(inputs: Any) -> None:
    """Raise DataError where a list of examples has several shapes, which numpy cannot stack."""
    if hasattr(inputs, "dtype") and inputs.dtype != object:
        return
    shapes = Counter(np.asarray(one).shape for one in inputs)
    if len(shapes) > 1:
        raise DataError(
            f"inputs have {len(shapes)} sizes, {listing(map(str, shapes), 5)}. Resize pictures to "
            "one (PIL's Image.resize), or pad them; pad series and texts to one length"
        )


def _as_they_are(inputs: NDArray[Any]) -> NDArray[Any]:
    """Return floats as float32, whole numbers as int64."""
    whole = np.issubdtype(inputs.dtype, np.integer)
    return np.ascontiguousarray(inputs, np.int64 if whole else np.float32)


def _wrong_inputs(inputs: NDArray[Any]) -> str:
    dtype, shape = inputs.dtype, inputs.shape
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
        if inputs.ndim == 4 and shape[1] in (1, 3) and shape[3] > MOST_CHANNELS:
            return (
                f"images {shape} look like (N, channels, H, W); channels come last: "
                "np.moveaxis(images, 1, -1)"
            )
        return ""
    if inputs.ndim == 4 and shape[3] <= MOST_CHANNELS < shape[1]:
        return (
            f"inputs {dtype} {shape} look like pictures (N, H, W, channels). Return them as uint8, "
            "0 to 255, to have them scaled and normalised; or channels first, to have them as "
            "they are: np.moveaxis(inputs, -1, 1)"
        )
    if dtype.kind == "f" and not np.isfinite(inputs).all():
        return "an input is no finite number (NaN or infinite). Fill or drop what is missing"
    return ""
