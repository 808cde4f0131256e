"""The clients of one call that share a head group, and their embeddings one after the other.

Where clients of different sizes share a group, each has as many rows as the group has chunks: its
own, and zeros behind them, of which nothing is emitted and nothing is learned.

Shapes: N clients, C chunks of a group, E embedding size, H hidden size, R rows of several clients.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server_app.hypernet.groups import members_by_group
from server_app.hypernet.head_bank import HeadBank
from server_app.hypernet.heads import HeadGroup


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


def parts_of(client_ids: Sequence[str], bank: HeadBank) -> list[Part]:
    """Split clients by head group; their rows are stacked in the order of the parts."""
    parts: list[Part] = []
    first = 0
    for key, positions in members_by_group(client_ids, bank.key).items():
        group, ids = bank.groups[key], [client_ids[i] for i in positions]
        stop = first + group.num_chunks * len(positions)
        parts.append(Part(group, positions, ids, slice(first, stop)))
        first = stop
    return parts


def stack_rows(parts: Sequence[Part], embeddings: Mapping[str, nn.Parameter]) -> Tensor:
    """Stack the embeddings of all parts: (R, E), zeros where a client has no chunk."""
    rows: list[Tensor] = []
    for part in parts:
        for client_id in part.client_ids:
            own_CE = embeddings[client_id].detach()
            rows.append(own_CE)
            if missing := part.group.num_chunks - len(own_CE):
                rows.append(own_CE.new_zeros(missing, own_CE.shape[1]))
    return torch.cat(rows)


def spread_rows(
    rows_gradient_RE: Tensor, parts: Sequence[Part], embeddings: Mapping[str, nn.Parameter]
) -> list[nn.Parameter]:
    """Give each embedding its rows of the gradient; rows of one client asked twice add up."""
    owners = [(c, part.group.num_chunks) for part in parts for c in part.client_ids]
    gradients: dict[str, Tensor] = {}
    pieces = torch.split(rows_gradient_RE, [heads for _, heads in owners])
    for (client_id, _), padded in zip(owners, pieces, strict=True):
        piece = padded[: len(embeddings[client_id])]
        known = gradients.get(client_id)
        gradients[client_id] = piece.clone() if known is None else known + piece
    for client_id, gradient in gradients.items():
        embeddings[client_id].grad = gradient
    return [embeddings[client_id] for client_id in gradients]
