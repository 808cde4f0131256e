"""What a state that is read back must fulfil before anything of it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from common.errors import CheckpointError


def required_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a saved state, or raise CheckpointError where it does not fit."""
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}, which its own list names.")
    if tuple(tensors[name].shape) != shape:
        raise CheckpointError(
            f"tensor {name!r} of the checkpoint has shape {tuple(tensors[name].shape)}; "
            f"expected {shape}."
        )
    return tensors[name]


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise CheckpointError when a setting of the saved run differs from this run's."""
    for key in keys:
        if saved.get(key) != current[key]:
            raise CheckpointError(
                f"the checkpoint was written with {key} = {saved.get(key)}; this run has "
                f"{current[key]}. Set {key} to the checkpoint's value to resume."
            )
