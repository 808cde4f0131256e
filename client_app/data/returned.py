"""What a participant's own function returned, in one form.

Shapes: N examples.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client_app.data.source import PARTS, Division
from common.errors import DataError, listing

FORMS = (
    "(inputs, labels); or a torch Dataset of such pairs; or a dict of train, test and perhaps "
    "validation with one of these each; or a dict of inputs, labels and groups or times"
)
ALSO = {"groups", "times", "target"}
"""What may stand beside inputs and labels."""


class Table(NamedTuple):
    """What a function returned: inputs (N, ...) or several by name, labels, how they are divided.

    `target` is what it says that labels are; "": as their type says.
    """

    inputs: Any
    labels: Any
    division: Division
    target: str = ""


def table_of(found: Any) -> Table:
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
            found = _taken_out(found)
        elif len(found) != 2 and isinstance(found[0], (tuple, list)) and len(found[0]) == 2:
            raise DataError("it returned a list of pairs; return them as two: tuple(zip(*pairs))")
        if len(found) == 2:
            return _stacked(found[0]), _array(found[1])
    raise DataError(f"it returned a {type(found).__name__}; expected {FORMS}")


def _taken_out(found: Any) -> tuple[Any, Any]:
    """Take inputs and labels out of a torch Dataset of pairs."""
    examples = [found[index] for index in range(len(found))]
    if not examples:
        raise DataError("it returned an empty Dataset")
    first = examples[0]
    if isinstance(first, Mapping):
        names = [str(name) for name in first]
        raise DataError(
            f"an example of the Dataset is a dict of {listing(names, 8)}; it must be a pair: "
            f"return (example[{names[0]!r}], example[{names[-1]!r}]) in __getitem__"
        )
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        has = f"{len(first)} entries" if isinstance(first, (tuple, list)) else type(first).__name__
        raise DataError(f"an example of the Dataset is {has}; it must be a pair (input, label)")
    inputs, labels = zip(*examples, strict=True)
    return inputs, labels


def _stacked(inputs: Any) -> Any:
    """Return inputs as one array, or as a dict of arrays where an example has several."""
    if isinstance(inputs, Mapping) and not hasattr(inputs, "to_numpy"):
        return {str(name): _stacked(values) for name, values in inputs.items()}
    if not (hasattr(inputs, "dtype") or hasattr(inputs, "to_numpy")) and len(inputs):
        first = inputs[0]
        if isinstance(first, Mapping):
            return {str(name): _stacked([one[name] for one in inputs]) for name in first}
        if isinstance(first, tuple) and len({np.shape(part) for part in first}) > 1:
            raise DataError(
                f"an example's input has {len(first)} parts without names; name them: "
                "{'image': image, 'table': table}, and take them by name in forward"
            )
    found = _array(inputs)
    _require_one_shape(inputs if found.dtype == object else found)
    return found


def _array(values: Any) -> NDArray[Any]:
    """Return values as an array: also of pandas, and floats where objects are numbers."""
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    elif not hasattr(values, "dtype"):
        _require_one_shape(values)
    found = np.asarray(values)
    if found.dtype == object:
        with contextlib.suppress(TypeError, ValueError):
            return found.astype(np.float64)
    return found


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
