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
from server_app.aggregation.base import Probe, StepDiagnostics, Update, schedule_factor, usable
from server_app.hypernet.heads import GroupDeltas, members_by_group, square_norm
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


def by_group(
    hypernet: Hypernetwork,
    client_ids: Sequence[str],
    deltas: Sequence[Tensor],
    shares: Sequence[float],
) -> list[GroupDeltas]:
    """Split the deltas of a step by head group; raise ValueError at one of another size."""
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
    """Return `rms_delta` and `coherence` (`StepDiagnostics`); not finite where a delta is not."""
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


class AdamRule:
    """One `Rule`; Adam's state of a parameter starts with the first step that touches it."""

    def __init__(
        self, hypernet: Hypernetwork, section: UpdateSection, *, total_rounds: float
    ) -> None:
        self.hypernet = hypernet
        self.section = section
        self.total_rounds = total_rounds
        self.frozen_groups: frozenset[str] = frozenset()
        self._trunk_learns = True
        empty = nn.Parameter(torch.empty(0))
        self._adam = torch.optim.Adam(
            [{"params": [*hypernet.trunk.parameters()]}, {"params": [empty]}],
            fused=True,
        )

    def step(self, updates: Sequence[Update], *, progress: float) -> StepDiagnostics:
        """Take one step along the mean of the updates; see `Rule.step`."""
        used = usable(updates)
        total = sum(update.weight for update in used)
        parts = by_group(
            self.hypernet,
            [update.client_id for update in used],
            [update.delta for update in used],
            [update.weight / total for update in used],
        )
        return self._take(parts, used, progress)

    def step_global(
        self, client_id: str, updates: Sequence[Update], *, progress: float
    ) -> StepDiagnostics:
        """Take one step for the global model along the mean of the updates; see `Rule`."""
        used = usable(updates)
        expected = (self.hypernet.num_parameters(client_id),)
        total = sum(update.weight for update in used)
        mean = torch.zeros(expected, device=self.hypernet.device)
        for update in used:
            if (shape := tuple(update.delta.shape)) != expected:
                raise ValueError(
                    f"global delta of client {update.client_id!r} has shape {shape}; the global "
                    f"model has {expected}."
                )
            mean.add_(update.delta.to(mean), alpha=update.weight / total)
        parts = by_group(self.hypernet, [client_id], [mean], [1.0])
        return self._take(parts, used, progress, is_global=True)

    def freeze(self, groups: Iterable[str]) -> None:
        """See `Rule.freeze`."""
        self.frozen_groups = frozenset(groups)
        self._trunk_learns = False

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

    def _take(
        self,
        parts: Sequence[GroupDeltas],
        used: Sequence[Update],
        progress: float,
        *,
        is_global: bool = False,
    ) -> StepDiagnostics:
        """Gradient, clip, step; nothing moves where a delta or the gradient is not finite."""
        factor = schedule_factor(self.section, progress, self.total_rounds)
        rates = self.section.server_lr * factor, self.section.embedding_lr * factor
        rms_delta, coherence = rms_and_coherence(parts)
        gradient, moved = Gradient([], [], rms_delta), 0.0
        if math.isfinite(rms_delta):
            deltas = [pair for p in parts for pair in zip(p.client_ids, p.deltas, strict=True)]
            probe = Probe(self.hypernet, deltas)
            gradient = self._gradient(parts, factor, is_global=is_global)
            self._apply(gradient, rates)
            moved = probe.moved()
        return StepDiagnostics(
            rms_delta=rms_delta,
            grad_norm=gradient.norm,
            clip_scale=self._clip_scale(gradient),
            learning_rate=rates[0],
            embedding_learning_rate=rates[1],
            gain_factor=factor,
            coherence=coherence,
            mean_staleness=sum(update.staleness for update in used) / len(used),
            max_staleness=max(update.staleness for update in used),
            num_updates=len(used),
            rms_theta_change=moved * rms_delta if moved else 0.0,
            effective_rate=moved,
            applied=math.isfinite(gradient.norm),
        )

    def _gradient(
        self, parts: Sequence[GroupDeltas], factor: float, *, is_global: bool
    ) -> Gradient:
        """Return the gradient of everything that learns; `is_global` where w_g does."""
        heads = {part.key for part in parts} - self.frozen_groups
        return backward(self.hypernet, parts, heads=heads, trunk=self._trunk_learns)

    def _clip_scale(self, gradient: Gradient) -> float:
        return min(1.0, CLIP_NORM / (gradient.norm + 1e-6))

    def _apply(self, gradient: Gradient, rates: tuple[float, float]) -> None:
        """Take one Adam step on the parameters that took part, and on no other."""
        scale, lists = self._clip_scale(gradient), (gradient.shared, gradient.embeddings)
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
