"""The least-squares rule of the heads: generated parameters go where the deltas point.

Adam decides how far a HEAD's weight moves; how far theta moves follows from the features, and is
far too much for what all clients share and far too little for what is each one's own
(docs/parallel.md has the measurements). This rule asks for a change of theta instead and finds the
heads that make it. For the clients i of a group, with running mean m of their deltas,

    wanted change of theta_i  =  - g (m_now + beta u)  -  r (delta_i - m),     u <- beta u + m_now

g is `shared-gain`, beta `shared-momentum` (Nesterov), r `personal-gain`. A gain of 1 moves theta by
what a client's own training moved it. What is shared goes into the bias of a head, what is personal
into its weight, which acts on features centred over the group:

    theta_i = b + W^T f_i,    W -= r P^T (delta - m),    b += r f_mean P^T (delta - m),
    P = the ridge solution (F F^T + d I)^-1 F over ALL clients of the group (rows F, centred)

Centred rows sum to zero, so what the personal changes of a step have in common is left out, and who
was not in the buffer moves by that and by what is shared. Beyond hidden-dim clients in a group the
rows depend on one another, and a client's personal change is felt a little by the others. Trunk and
embeddings keep Adam, or stand still where both their rates are 0.
Differs from paper: there phi descends along J^T delta.

One mechanism for every schedule: a pass over the group's N clients (all that are known, present or
not, w_g among them) makes shared steps of g in all, in one piece or in N/n of them: n updates are
n/N = p of a pass, and g p, p m_now and beta^p stand for g, m_now (in u) and beta. No step has a
gain above 1: velocity adds to it, and beyond that the first rounds diverge.

Shapes: n updates, N clients of the group, C chunks, c chunks of a tile, S chunk size, H hidden.
"""

# ruff: noqa: N803, N806, N815 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import BY_SIZE, UpdateSection
from common.log import logger
from common.serialization import required_tensor
from server_app.aggregation.adam import AdamRule, Gradient, backward
from server_app.hypernet.heads import GroupDeltas
from server_app.hypernet.network import Hypernetwork

RETURNED, OWN = 5.0, 1.4
SETTLES, FOLLOWED = 6.0, 1.6
"""beta = 1 - RETURNED/N, personal gain = OWN/N of a group of N clients, if the run is long enough.

A client's own delta comes back to it through what is shared, g / (N (1 - beta)) of it in all: from
five clients on, a fifth for g = 1, however many there are. With the same beta a small group
overfits by momentum, and a large one is slow without. Fitted to 2, 10 and 50 clients.

In R rounds a velocity that remembers more than R/SETTLES of them does not settle, and what is
personal should be followed FOLLOWED times over: 1 - SETTLES/R and FOLLOWED/R are the bounds, at
R = 60 those of 50 clients (docs/parallel.md has 100 clients and 20 rounds)."""
ROUNDING = 1e-9
"""Squared, relative: float32 features that differ by less than 3e-5 of their size are equal."""


@dataclass
class GroupState:
    """What the rule remembers of a group: velocity u and running mean m of the deltas, (C, S)."""

    velocity: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Solved:
    """P of all members of a group, and the mean of their features; of these embeddings."""

    embeddings: list[nn.Parameter]
    rows_CNH: Tensor
    mean_CH: Tensor


class LeastSquaresRule(AdamRule):
    """Heads by least squares, trunk and embeddings by Adam; one `Rule`."""

    def __init__(
        self, hypernet: Hypernetwork, section: UpdateSection, *, total_rounds: float
    ) -> None:
        super().__init__(hypernet, section, total_rounds=total_rounds)
        self._state: dict[str, GroupState] = {}
        self._crowded: set[str] = set()
        self._at_rest = not (section.server_lr or section.embedding_lr)
        self._solved: dict[str, Solved] = {}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export also the memory, as `least-squares.<velocity|mean>.<key>`, and the keys."""
        tensors, facts = super().state_dict()
        for key, memory in self._state.items():
            tensors |= {f"least-squares.{part}.{key}": x for part, x in vars(memory).items()}
        return tensors, facts | {"least-squares": sorted(self._state)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state; see `Rule.load_state_dict`."""
        super().load_state_dict(tensors, facts)
        for key in facts.get("least-squares", []):  # nothing in a checkpoint of another rule
            memory = self._state_of(key)
            for part, x in vars(memory).items():
                x.copy_(required_tensor(tensors, f"least-squares.{part}.{key}", tuple(x.shape)))

    def _gradient(
        self, parts: Sequence[GroupDeltas], factor: float, *, is_global: bool
    ) -> Gradient:
        """Move the heads, and return the gradient of trunk and embeddings before that."""
        gradient = Gradient([], [], 0.0)
        if not self._at_rest:
            gradient = backward(self.hypernet, parts, heads=(), trunk=self._trunk_learns)
        if math.isfinite(gradient.norm):
            for part in parts:
                if part.key not in self.frozen_groups:
                    self._move_heads(part, factor, is_global=is_global)
        return gradient

    @torch.no_grad()
    def _move_heads(self, part: GroupDeltas, factor: float, *, is_global: bool) -> None:
        """Move what is shared by the bias, what is personal by the weight.

        w_g's mean delta is followed whole, as FedAvg does it: its personal gain is 1. (A full
        SHARED step for it too, next to the clients' own, diverges.)
        """
        members, section = self.hypernet.members(part.key), self.section
        count, n = len(members), len(part.deltas)
        self._warn_of_crowd(part, count)
        beta, own_gain = gains(section, num_clients=count, rounds=self.total_rounds)
        portion = min(1.0, n / count)
        beta **= portion
        memory = self._state_of(part.key)
        memory.mean.lerp_(part.mean_CS, portion)
        memory.velocity.mul_(beta).add_(part.mean_CS, alpha=portion)
        shared_CS = part.mean_CS.add(memory.velocity, alpha=beta)
        shared_gain = min(1.0, section.shared_gain * portion) * factor
        part.group.bias.sub_(shared_CS, alpha=shared_gain)
        own_gain = factor * (1.0 if is_global else own_gain)
        if own_gain:
            rows = [members.index(client_id) for client_id in part.client_ids]
            gains_n = part.shares * (own_gain * n / part.shares.sum())
            solved = self._solve(part.key, members)
            self._move_personal(part, solved.rows_CNH[:, rows] * gains_n[:, None], solved.mean_CH)

    def _move_personal(self, part: GroupDeltas, solved_CnH: Tensor, mean_CH: Tensor) -> None:
        """Move the heads by P^T (delta - m), P (C, n, H); `mean_CH` of all members' features."""
        # one product: m is one more row, with what all rows together take of it
        solved_CnH = torch.cat([solved_CnH, -solved_CnH.sum(1, keepdim=True)], dim=1)
        across_CHn = solved_CnH.transpose(1, 2)
        onto_C1n = mean_CH[:, None] @ across_CHn
        vectors = [*part.deltas, self._state_of(part.key).mean.view(-1)]
        for work, moves_cnS in part.group.gathered(vectors):
            part.group.weight[work].baddbmm_(across_CHn[work], moves_cnS, alpha=-1)
            part.group.bias[work].unsqueeze(1).baddbmm_(onto_C1n[work], moves_cnS)

    def _solve(self, key: str, members: list[str]) -> Solved:
        """Solve for all members of a group; once while trunk and embeddings are at rest."""
        embeddings = [self.hypernet.embeddings[client_id] for client_id in members]
        known = self._solved.get(key)
        if known and [*map(id, known.embeddings)] == [*map(id, embeddings)]:
            return known
        features_CNH = self.hypernet.features(members)
        rows_CNH = ridge_rows(features_CNH, self.section.kernel_damping)
        solved = Solved(embeddings, rows_CNH, features_CNH.mean(1))
        if self._at_rest:
            self._solved[key] = solved
        return solved

    def _state_of(self, key: str) -> GroupState:
        if key not in self._state:
            blank = torch.zeros_like(self.hypernet.groups[key].bias, requires_grad=False)
            self._state[key] = GroupState(blank, blank.clone())
        return self._state[key]

    def _warn_of_crowd(self, part: GroupDeltas, count: int) -> None:
        """Say once where a group has more clients than its heads can tell apart."""
        hidden = self.hypernet.section.hidden_dim
        if count - 1 <= hidden or part.key in self._crowded:  # centred features: rank N - 1
            return
        self._crowded.add(part.key)
        logger.warning(
            "%d clients share heads of hidden-dim %d: some %.0f %% of what is a client's own "
            "reaches it, the rest is felt by the others. Set hidden-dim to %d or more; the "
            "server's memory grows with it.",
            count,
            hidden,
            100 * hidden / (count - 1),
            count - 1,
        )


def gains(section: UpdateSection, *, num_clients: int, rounds: float) -> tuple[float, float]:
    """Return beta of a whole pass, and the personal gain, of a group of N clients.

    `shared-momentum` and `personal-gain`; where they are left at -1, what fits N and the run.
    """
    beta, own = section.shared_momentum, section.personal_gain
    if beta == BY_SIZE:
        beta = max(0.0, 1 - max(RETURNED / num_clients, SETTLES / rounds))
    if own == BY_SIZE:
        own = min(1.0, max(OWN / num_clients, FOLLOWED / rounds))
    return beta, own


def ridge_rows(features_CNH: Tensor, damping: float) -> Tensor:
    """Return (F F^T + d I)^-1 F, (C, N, H), chunk by chunk; F is centred.

    d is `damping` times the mean squared norm of a centred row, so that it has no unit, and at
    least ROUNDING times that of a row as it came: features that differ by rounding alone are equal,
    and nothing personal can be told apart by them. Solved in float64, in the smaller of the two
    spaces: N x N, or H x H by (F F^T + d I)^-1 F = F (F^T F + d I)^-1. The result is scaled by
    1 + damping, so that clients with orthogonal features get the whole of what is asked.
    """
    wide = features_CNH.double()
    floor_C = ROUNDING * wide.square().sum(2).mean(1) + torch.finfo(torch.float64).tiny
    wide = wide - wide.mean(1, keepdim=True)
    d_C = torch.maximum(damping * wide.square().sum(2).mean(1), floor_C)
    across = wide.transpose(1, 2)
    small = wide.shape[1] <= wide.shape[2]
    system = wide @ across if small else across @ wide
    system.diagonal(dim1=1, dim2=2).add_(d_C[:, None])
    solved = torch.cholesky_solve(wide if small else across, torch.linalg.cholesky(system))
    rows_CNH = solved if small else solved.transpose(1, 2)
    return (rows_CNH * (1 + damping)).to(features_CNH.dtype)
