"""The clients of one call that share a head group."""

# ruff: noqa: N803 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


def stacked_rows(parts: Sequence[Part], embeddings: Mapping[str, nn.Parameter]) -> Tensor:
    """Stack the embeddings of all parts: (R, E), a copy."""
    return torch.cat([embeddings[c].detach() for part in parts for c in part.client_ids])


def spread_gradient(
    rows_gradient_RE: Tensor, parts: Sequence[Part], embeddings: Mapping[str, nn.Parameter]
) -> list[nn.Parameter]:
    """Give each embedding its rows of the gradient; rows of one client asked twice add up."""
    owners = [c for part in parts for c in part.client_ids]
    gradients: dict[str, Tensor] = {}
    pieces = torch.split(rows_gradient_RE, [len(embeddings[c]) for c in owners])
    for client_id, piece in zip(owners, pieces, strict=True):
        known = gradients.get(client_id)
        gradients[client_id] = piece.clone() if known is None else known + piece
    for client_id, gradient in gradients.items():
        embeddings[client_id].grad = gradient
    return [embeddings[client_id] for client_id in gradients]
