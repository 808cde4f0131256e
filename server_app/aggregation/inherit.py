"""Hands an optimiser's state on to head groups that go on from another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server_app.hypernet.head_bank import Heir


def inherit_moments(adam: torch.optim.Adam, heirs: Sequence[Heir]) -> None:
    """Copy Adam's moments and step counters of each old group to its heir.

    Heads that the old group did not have start with moments of 0.
    """
    for heir in heirs:
        pairs = ((heir.old.weight, heir.new.weight), (heir.old.bias, heir.new.bias))
        for old, new in pairs:
            if state := adam.state.get(old):
                adam.state[new] = {part: _widened(value, new) for part, value in state.items()}


def _widened(value: Tensor, like: Tensor) -> Tensor:
    """Copy a counter, or a moment (C, ...), with zeros for further chunks."""
    if value.dim() == 0:
        return value.clone()
    wide = torch.zeros_like(like, requires_grad=False)
    wide[: len(value)] = value
    return wide
