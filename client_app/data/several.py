"""Examples of several inputs: kept as one row of floats, and taken apart before the model.

What is batched, moved and stored is one tensor, whatever a model takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import DataError

Parts = Mapping[str, Sequence[Any]]
"""By name of an input: its type, "float32" or "int64", then the shape of one example's."""
LARGEST_ID = 2**24
"""That float32 counts exactly."""


def packed(inputs: Any) -> tuple[NDArray[Any], dict[str, list[Any]]]:
    """Put the inputs of every example in a row (N, D) float32, and say where each is.

    One array is returned as it is, with {}. Of several, pictures (uint8) become 0 to 1. Raises
    DataError where they do not belong together.
    """
    if not isinstance(inputs, Mapping):
        return np.asarray(inputs), {}
    arrays = {name: np.asarray(x) for name, x in inputs.items()}
    shapes = {name: x.shape for name, x in arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1:
        raise DataError(f"inputs {shapes} must have one entry each for every example, (N, ...)")
    rows, parts = [], {}
    for name, x in arrays.items():
        if not name.isidentifier() or x.dtype.kind not in "uifb":
            raise DataError(f"input {name!r} is {x.dtype}; expected numbers, by a Python name")
        is_ids = x.dtype.kind in "ui" and x.dtype != np.uint8
        if is_ids and np.abs(x).max(initial=0) > LARGEST_ID:
            raise DataError(f"input {name!r} has whole numbers above {LARGEST_ID:,}")
        scale = 255 if x.dtype == np.uint8 else 1
        rows.append(x.reshape(len(x), -1).astype(np.float32) / np.float32(scale))
        parts[name] = ["int64" if is_ids else "float32", *x.shape[1:]]
    return np.concatenate(rows, axis=1), parts


def taken_apart(row: Tensor, parts: Parts) -> dict[str, Tensor]:
    """Return the inputs (B, ...) by name of packed examples (B, D)."""
    sizes = [math.prod(shape) for _, *shape in parts.values()]
    found = {}
    for (name, (kind, *shape)), part in zip(
        parts.items(), torch.split(row, sizes, dim=1), strict=True
    ):
        whole = part.reshape(-1, *shape)
        found[name] = whole.long() if kind == "int64" else whole
    return found


def take_apart(module: nn.Module, parts: Parts) -> nn.Module:
    """Let a model that takes several inputs by name be called with packed examples, in place."""
    if parts:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: ((), taken_apart(args[0], parts)) if args else (args, kwargs),
            with_kwargs=True,
        )
    return module
