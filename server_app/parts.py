"""The clients of one call that share a head group."""

# ruff: noqa: N803 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from server_app.heads import HeadGroup


@dataclass(frozen=True)
class Part:
    """The clients of one call that share a head group, and where their rows are stacked."""

    group: HeadGroup
    positions: Sequence[int]
    client_ids: Sequence[str]
    rows: slice

    def chunk_major(self, stacked_RH: Tensor) -> Tensor:
        """View this part's rows of (R, H) as (C, N, H)."""
        rows = stacked_RH[self.rows]
        return rows.view(len(self.client_ids), -1, rows.shape[1]).transpose(0, 1)
