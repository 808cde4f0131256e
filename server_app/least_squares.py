"""The least-squares rule of the heads: generated parameters go where the deltas point.

Adam decides how far a HEAD's weight moves; how far theta moves follows from the features, and is
far too much for what all clients share and far too little for what is each one's own (docs/
parallel.md has the measurements). This rule asks for a change of theta instead and finds the heads
that make it. For the clients i of a group, with running mean m of their deltas,

    wanted change of theta_i  =  - g (m_now + beta u)  -  r (delta_i - m),     u <- beta u + m_now

g is `shared-gain`, beta `shared-momentum` (Nesterov), r `personal-gain`. A gain of 1 moves theta by
what a client's own training moved it. What is shared goes into the bias of a head, what is
personal into its weight, which acts on features centred over the group's clients:

    theta_i = b + W^T (f_i - f_mean),    W -= r P^T (delta - m),   P = rows of (F F^T + d I)^-1 F

the ridge solution over ALL clients of the group (rows F, damping d). Centred rows sum to zero, so
what the personal changes of a step have in common is left out, and who was not in the buffer moves
by that and by what is shared. Beyond hidden-dim clients in a group the rows depend on one another,
and a client's personal change is felt a little by the others.
Differs from paper: there phi descends along J^T delta.

One mechanism for every schedule: a pass over the group's N clients (all that are known, present or
not, w_g among them) makes shared steps of g in all, in one piece or in N/n of them: n updates are
n/N = p of a pass, and g p, p m_now and beta^p stand for g, m_now (in u) and beta. No step has a
gain above 1: velocity adds to it, and beyond that the first rounds diverge. (Full steps for every
cohort were tried: each client's own delta then stays in the bias for good, and clients overfit.)

Shapes: n updates, N clients of the group, C chunks, c chunks of a tile, S chunk size, H hidden.
"""

# ruff: noqa: N803, N806, N815 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import UpdateSection
from server_app.checkpoint import required_tensor
from server_app.head_bank import Heir
from server_app.heads import TILE_BYTES, HeadGroup, HeadPullback
from server_app.memory import Scratch

MEMORY = ("velocity", "mean")
ROUNDING = 1e-9
"""Squared, relative: float32 features that differ by less than 3e-5 of their size are equal."""


@dataclass(frozen=True)
class GroupBatch:
    """The updates of one head group in one step.

    Attributes
    ----------
    group : the heads.
    features_CNH : the trunk's output for ALL clients of the group.
    rows : which of these clients sent the updates, one row each; may repeat.
    deltas : (P_i,) each.
    shares : (n,) float32, positive; shares of the whole step.
    """

    key: str
    group: HeadGroup
    features_CNH: Tensor
    rows: Sequence[int]
    deltas: Sequence[Tensor]
    shares: Tensor

    def __len__(self) -> int:
        return len(self.deltas)

    @property
    def num_clients(self) -> int:
        """N, those of the group whether they sent something or not."""
        return self.features_CNH.shape[1]


@dataclass(frozen=True)
class Pace:
    """How far a step goes.

    Attributes
    ----------
    factor : of both gains, from warm-up and decay.
    follows : the updates are followed whole, at a personal gain of 1: the global model's mean delta
        is FedAvg's step. (A full SHARED step for it too, next to the clients' own, diverges.)
    """

    factor: float
    follows: bool = False

    @staticmethod
    def of_pass(batch: GroupBatch) -> float:
        """Return the part of a pass over the group's clients that these updates are, at most 1."""
        return min(1.0, len(batch) / batch.num_clients)

    def personal_gain(self, section: UpdateSection) -> float:
        """Return how much of what is an update's own is followed."""
        return (1.0 if self.follows else section.personal_gain) * self.factor


@dataclass
class GroupMemory:
    """What the rule remembers of a group: velocity u and running mean m of the deltas, (C, S)."""

    velocity: Tensor
    mean: Tensor


class LeastSquares:
    """Moves the heads of one hypernetwork; keeps a `GroupMemory` for each group."""

    def __init__(self, section: UpdateSection) -> None:
        self._section = section
        self._memory: dict[str, GroupMemory] = {}

    @torch.no_grad()
    def descend(
        self, batch: GroupBatch, pace: Pace, *, scratch: Scratch, moves: bool = True
    ) -> HeadPullback:
        """Move the group's heads in place; return what its trunk and embeddings are to learn from.

        The gradient of the features is that of the heads before the move.

        Parameters
        ----------
        scratch
            Memory for tiles; overwritten.
        moves
            False leaves the heads alone (`novel-only`); so does a delta that is not finite.
        """
        group, n = batch.group, len(batch)
        moves = moves and all(bool(torch.isfinite(delta).all()) for delta in batch.deltas)
        within = batch.shares / batch.shares.sum()
        center_CH = batch.features_CNH.mean(1)
        pulled = torch.empty(group.num_chunks, n, center_CH.shape[1], device=center_CH.device)
        squares = torch.zeros(n, dtype=torch.float64, device=center_CH.device)
        mean_square = torch.zeros((), dtype=torch.float64, device=center_CH.device)
        for tile in group.tiles(0, group.num_chunks, rows=n, budget=TILE_BYTES):
            packed_ncS = group.pack(batch.deltas, tile, scratch)
            rows = n + group.weight.shape[1]
            for work in group.tiles(tile.start, tile.stop, rows=rows, budget=group.work_bytes):
                delta_ncS = packed_ncS[:, work.start - tile.start : work.stop - tile.start]
                delta_cnS = delta_ncS.transpose(0, 1)
                mean_cS = torch.matmul(within, delta_cnS)
                squares += torch.linalg.vector_norm(delta_ncS, dim=2).double().square().sum(1)
                mean_square += torch.linalg.vector_norm(mean_cS, dim=1).double().square().sum()
                torch.bmm(delta_cnS, group.weight[work].transpose(1, 2), out=pulled[work])
                if moves:
                    self._move(batch, pace, work, (delta_cnS, mean_cS, center_CH[work]))
        pulled *= batch.shares[:, None]
        return HeadPullback(pulled, squares, mean_square, torch.zeros_like(mean_square))

    def _move(
        self, batch: GroupBatch, pace: Pace, work: slice, now: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Move some chunks: what is shared by the bias, what is personal by the weight."""
        delta_cnS, mean_cS, center_cH = now
        n, group, section = len(batch), batch.group, self._section
        memory = self._remembered(batch)
        part = pace.of_pass(batch)
        beta = section.shared_momentum**part
        memory.mean[work].lerp_(mean_cS, min(1.0, n / batch.num_clients))
        velocity_cS = memory.velocity[work].mul_(beta).add_(mean_cS, alpha=part)
        shared_cS = mean_cS.add(velocity_cS, alpha=beta) if beta else mean_cS
        group.bias[work].sub_(shared_cS, alpha=min(1.0, section.shared_gain * part) * pace.factor)
        own_gain = pace.personal_gain(section)
        if own_gain:
            solved_cnH = ridge_rows(batch.features_CNH[work], batch.rows, section.kernel_damping)
            solved_cnH *= own_gain
            solved_cnH *= (batch.shares * (n / batch.shares.sum()))[:, None]
            own_cnS = delta_cnS.sub_(memory.mean[work][:, None])
            group.weight[work].baddbmm_(solved_cnH.transpose(1, 2), own_cnS, alpha=-1)
            onto_c1n = torch.bmm(center_cH[:, None], solved_cnH.transpose(1, 2))
            group.bias[work].unsqueeze(1).baddbmm_(onto_c1n, own_cnS)

    def _remembered(self, batch: GroupBatch) -> GroupMemory:
        known = self._memory.get(batch.key)
        if known is None:
            blank = torch.zeros_like(batch.group.bias)
            known = self._memory[batch.key] = GroupMemory(blank, blank.clone())
        return known

    def inherit(self, heirs: Sequence[Heir]) -> None:
        """Copy what is remembered of each group that was split to its heir."""
        for heir in heirs:
            if known := self._memory.get(heir.old_key):
                self._memory[heir.new_key] = GroupMemory(known.velocity.clone(), known.mean.clone())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the memory as `least-squares.<velocity|mean>.<key>`, and the keys."""
        tensors = {
            f"least-squares.{part}.{key}": getattr(memory, part)
            for key, memory in self._memory.items()
            for part in MEMORY
        }
        return tensors, {"least-squares": sorted(self._memory)}

    def load_state_dict(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        groups: Mapping[str, HeadGroup],
    ) -> None:
        """Restore an exported memory; raise CheckpointError when a tensor is missing or misfits."""
        self._memory = {}
        for key in map(str, meta.get("least-squares", [])):
            bias = groups[key].bias
            parts = [
                required_tensor(tensors, f"least-squares.{part}.{key}", tuple(bias.shape))
                for part in MEMORY
            ]
            self._memory[key] = GroupMemory(*(p.to(bias.device, copy=True) for p in parts))


def ridge_rows(features_cNH: Tensor, rows: Sequence[int], damping: float) -> Tensor:
    """Return the rows asked for of (F F^T + d I)^-1 F, (c, n, H), chunk by chunk; F is centred.

    d is `damping` times the mean squared norm of a centred row, so that it has no unit, and at
    least ROUNDING times that of a row as it came: features that differ by rounding alone are equal,
    and nothing personal can be told apart by them. Solved in float64, in the smaller of the two
    spaces: N x N, or H x H by (F F^T + d I)^-1 F = F (F^T F + d I)^-1. The result is scaled by
    1 + damping, so that clients with orthogonal features get the whole of what is asked.
    """
    wide = features_cNH.double()
    floor_c = ROUNDING * wide.square().sum(2).mean(1) + torch.finfo(torch.float64).tiny
    wide = wide - wide.mean(1, keepdim=True)
    d_c = torch.maximum(damping * wide.square().sum(2).mean(1), floor_c)
    if wide.shape[1] <= wide.shape[2]:
        system, right = wide @ wide.transpose(1, 2), wide
    else:
        system, right = wide.transpose(1, 2) @ wide, wide[:, list(rows)].transpose(1, 2)
    system.diagonal(dim1=1, dim2=2).add_(d_c[:, None])
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(system))
    picked = solved[:, list(rows)] if right is wide else solved.transpose(1, 2)
    return (picked * (1 + damping)).to(features_cNH.dtype)
