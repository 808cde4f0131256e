"""The pull-back of deltas through the hypernetwork: J^T delta, for one client or for many at once.

Shapes: n deltas, N clients of a group, C chunks of a group, S chunk size, E embedding size, H
hidden size, R rows of several embeddings one after the other.
"""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server_app.hypernet.heads import GroupDeltas, members_by_group, square_norm
from server_app.hypernet.network import Hypernetwork, by_chunk


@dataclass(frozen=True)
class Gradient:
    """Parameters whose `grad` was written by `backward`: trunk and heads, embeddings.

    `norm` is the global 2-norm of all these gradients.
    """

    shared: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    norm: float


def by_group(
    hypernet: Hypernetwork,
    client_ids: Sequence[str],
    deltas: Sequence[Tensor],
    shares: Sequence[float],
) -> list[GroupDeltas]:
    """Split the deltas of a step by head group, in the order of `group_order`.

    Raises
    ------
    RegistrationError
        A client is not known.
    ValueError
        A delta has not its client's size.
    """
    for client_id, delta in zip(client_ids, deltas, strict=True):
        shape, expected = tuple(delta.shape), (hypernet.num_parameters(client_id),)
        if shape != expected:
            raise ValueError(
                f"delta of client {client_id!r} has shape {shape}; its theta has {expected}."
            )
    device = hypernet.device
    return [
        GroupDeltas(
            key=key,
            group=hypernet.groups[key],
            client_ids=[client_ids[i] for i in positions],
            deltas=[deltas[i].to(device) for i in positions],
            shares=torch.tensor([shares[i] for i in positions], device=device),
        )
        for key, positions in members_by_group(client_ids, hypernet.group_key).items()
    ]


def rms_and_coherence(parts: Sequence[GroupDeltas]) -> tuple[float, float]:
    """Return two facts of a step's deltas; not finite where a delta is not.

    The root mean square over all entries, and |mean delta|^2 / mean |delta_i|^2, pooled over head
    groups: 1 when all agree (or there is one), 1/N when they are unrelated.
    """
    total = sum(sum(part.square_norms) for part in parts)
    if not 0 < total < math.inf:
        return math.sqrt(total), 1.0
    agreed = sum(len(part.deltas) * part.mean_square for part in parts)
    entries = sum(len(delta) for part in parts for delta in part.deltas)
    return math.sqrt(total / entries), agreed / total


def backward(
    hypernet: Hypernetwork,
    parts: Sequence[GroupDeltas],
    *,
    heads: Collection[str],
    trunk: bool = True,
) -> Gradient:
    """Compute sum_i share_i J_i^T delta_i at the current phi, as `grad` of what learns.

    The heads of a group get the mean over that group's clients, trunk and embeddings the sum with
    the shares as given. One client alone with share 1 gives the published J_i^T delta_i. Any
    `grad` of an earlier call is replaced.

    Parameters
    ----------
    heads : keys of the groups whose heads learn.
    trunk : whether the trunk learns; embeddings always do.
    """
    rows = [hypernet.rows(part.client_ids) for part in parts]
    rows_RE, lengths = torch.cat(rows).requires_grad_(), [*map(len, rows)]
    with torch.enable_grad():
        features_RH = hypernet.trunk(rows_RE)
    gradient_RH = torch.empty_like(features_RH)
    shared, square = [*hypernet.trunk.parameters()] if trunk else [], 0.0
    learning = [*shared]
    pieces = zip(
        torch.split(features_RH.detach(), lengths), torch.split(gradient_RH, lengths), strict=True
    )
    for part, (features, gradient) in zip(parts, pieces, strict=True):
        group, count, learns = part.group, len(part.client_ids), part.key in heads
        pulled_CNH, weight_square = group.pull_back(
            by_chunk(features, count), part.deltas, part.shares, learns=learns
        )
        by_chunk(gradient, count).copy_(pulled_CNH)
        if learns:
            group.bias.grad = part.mean_CS
            square += weight_square + part.mean_square
            learning += [group.weight, group.bias]
    *found, rows_gradient_RE = torch.autograd.grad(features_RH, [*shared, rows_RE], gradient_RH)
    for parameter, gradient in zip(shared, found, strict=True):
        parameter.grad = gradient
    embeddings = _spread(hypernet, parts, torch.split(rows_gradient_RE, lengths))
    others = [p.grad for p in (*shared, *embeddings) if p.grad is not None]
    square += sum(float(square_norm(g.flatten())) for g in others)
    return Gradient(learning, embeddings, math.sqrt(square))


def _spread(
    hypernet: Hypernetwork, parts: Sequence[GroupDeltas], gradients: Sequence[Tensor]
) -> list[nn.Parameter]:
    """Give each embedding its rows of the gradient; a client that is there twice gets the sum."""
    found: dict[str, Tensor] = {}
    for part, gradient in zip(parts, gradients, strict=True):
        pieces = gradient.view(len(part.client_ids), -1, gradient.shape[1])
        for client_id, piece in zip(part.client_ids, pieces, strict=True):
            own = piece[: len(hypernet.embeddings[client_id])]
            found[client_id] = found[client_id] + own if client_id in found else own
    for client_id, gradient in found.items():
        hypernet.embeddings[client_id].grad = gradient
    return [hypernet.embeddings[client_id] for client_id in found]
