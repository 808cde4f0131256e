"""The published rule: one Adam step on phi and the embeddings along the pulled-back deltas.

With one update this is the paper's step (docs/method.md, "One MH-pFedHN round as published"):
vector-Jacobian product at the current phi, global norm clipped, one Adam step. With several it is
the mean of the buffer. Of parameters that no update of the step touches (other groups' heads, other
clients' embeddings) neither moments nor step counters move.

Which mean: a head group's gradient is the mean over that group's updates in the buffer; trunk and
embeddings get the mean over the whole buffer, so an embedding's gradient carries its client's share
1/M (Adam is insensitive to that constant; the norm clip sees the gradient of ONE mean loss).
Differs from paper: the mean and the two learning rates (docs/parallel.md).

Shapes: N clients of a group, C chunks, S chunk size, E embedding size, H hidden size, R rows of
several embeddings one after the other.
"""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import UpdateSection
from common.errors import CheckpointError
from common.serialization import required_tensor
from server_app.aggregation.base import Moved, Rule
from server_app.hypernet.groups import GroupDeltas, square_norm
from server_app.hypernet.network import Hypernetwork, by_chunk

MOMENTS = ("exp_avg", "exp_avg_sq")
CLIP_NORM = 50.0
"""A longer gradient is scaled down to this norm before Adam (docs/method.md)."""


@dataclass(frozen=True)
class Gradient:
    """Parameters whose `grad` was written by `backward`, and the 2-norm of all these gradients."""

    shared: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    norm: float


def backward(
    hypernet: Hypernetwork,
    parts: Sequence[GroupDeltas],
    *,
    heads: Collection[str],
    trunk: bool = True,
) -> Gradient:
    """Compute sum_i share_i J_i^T delta_i at the current phi, as `grad` of what learns.

    The heads of a group get the mean over that group's clients, trunk and embeddings the sum with
    the shares as given. One client alone with share 1 gives the published J_i^T delta_i. Heads of
    the groups in `heads` learn, the trunk where `trunk` says so, embeddings always.
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
        group, count, learns = hypernet.groups[part.key], len(part.client_ids), part.key in heads
        pulled_CNH, weight_square = group.pull_back(
            by_chunk(features, count), part.deltas, part.shares, learns=learns
        )
        by_chunk(gradient, count).copy_(pulled_CNH)
        if learns:
            group.bias.grad = part.mean.view_as(group.bias)
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


class AdamRule(Rule):
    """Adam's state of a parameter starts with the first step that touches it."""

    hypernet: Hypernetwork

    def __init__(
        self, hypernet: Hypernetwork, section: UpdateSection, *, total_rounds: float
    ) -> None:
        super().__init__(hypernet, section, total_rounds=total_rounds)
        self._trunk_learns = True
        empty = nn.Parameter(torch.empty(0))
        self._adam = torch.optim.Adam(
            [{"params": [*hypernet.trunk.parameters()]}, {"params": [empty]}],
            fused=True,
        )

    def freeze(self, groups: Iterable[str]) -> None:
        """See `Rule.freeze`."""
        super().freeze(groups)
        self._trunk_learns = False

    def rates(self, factor: float) -> tuple[float, float]:
        """See `Rule.rates`."""
        return self.section.server_lr * factor, self.section.embedding_lr * factor

    def move(self, parts: Sequence[GroupDeltas], factor: float, *, is_global: bool) -> Moved:
        """Gradient, clip, step."""
        heads = {part.key for part in parts} - self.frozen_groups
        gradient = backward(self.hypernet, parts, heads=heads, trunk=self._trunk_learns)
        scale = min(1.0, CLIP_NORM / (gradient.norm + 1e-6))
        self._apply(gradient, scale, self.rates(factor))
        return Moved(gradient.norm, scale)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the Adam state as `adam.<exp_avg|exp_avg_sq|step>.<parameter>`, and the names.

        The tensors share memory with the live state: write or copy them before the next step.
        """
        tensors: dict[str, Tensor] = {}
        names: list[str] = []
        for name, parameter in self.hypernet.named_parameters().items():
            if state := self._adam.state.get(parameter):
                names.append(name)
                tensors |= {f"adam.{part}.{name}": state[part] for part in (*MOMENTS, "step")}
        return tensors, {"adam": names}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state; see `Rule.load_state_dict`."""
        self._adam.state.clear()
        parameters = self.hypernet.named_parameters()
        for name in facts["adam"]:
            if name not in parameters:
                raise CheckpointError(
                    f"the checkpoint has Adam moments of {name!r}, which the hypernetwork does not "
                    "have. Load the hypernetwork's state from the same checkpoint first."
                )
            parameter = parameters[name]
            for part in (*MOMENTS, "step"):
                shape = tuple(parameter.shape) if part in MOMENTS else ()
                saved = required_tensor(tensors, f"adam.{part}.{name}", shape)
                self._adam.state[parameter][part] = saved.to(parameter.device, copy=True)

    def _apply(self, gradient: Gradient, scale: float, rates: tuple[float, float]) -> None:
        """Take one Adam step on the parameters that took part, and on no other."""
        lists = gradient.shared, gradient.embeddings
        for group, parameters, rate in zip(self._adam.param_groups, lists, rates, strict=True):
            group["params"], group["lr"] = parameters, rate
            for parameter in parameters if scale < 1 else ():  # rare, and half as dear as Adam
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        if any(lists) and math.isfinite(gradient.norm):
            self._adam.step()
        for parameter in (*gradient.shared, *gradient.embeddings):
            parameter.grad = None
        living: set[Tensor] = {*self.hypernet.named_parameters().values()}
        for state in [p for p in self._adam.state if p not in living]:  # of removed clients
            del self._adam.state[state]
