"""The least-squares rule of the heads: generated parameters go where the deltas point.

Adam decides how far a HEAD's weight moves; how far theta moves follows from the features, and is
far too much for what all clients share and far too little for what is each one's own (docs/
parallel.md has the measurements). This rule asks for a change of theta instead and finds the heads
that make it. For the clients i of a group, with running mean m of their deltas,

    wanted change of theta_i  =  - g (m_now + beta u)  -  r (delta_i - m),     u <- beta u + m_now

g is `shared-gain`, beta `shared-momentum` (Nesterov), r `personal-gain`. A gain of 1 moves theta by
what a client's own training moved it. Left at -1, beta and r fit a group of N clients and a run of
R rounds: 1 - max(5/N, 6/R), at least 0, and max(1.4/N, 1.6/R), at most 1. What is shared goes into
the bias of a head, what is personal into its weight, which acts on features centred over the group:

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

# ruff: noqa: N806, N815 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import BY_SIZE, UpdateSection
from common.log import logger
from server_app.aggregation.ledger import Heads, Ledger
from server_app.hypernet.head_bank import Heir
from server_app.hypernet.heads import HeadGroup, HeadPullback
from server_app.hypernet.memory import Scratch
from server_app.output.checkpoint import required_tensor

MEMORY = ("velocity", "mean")
RETURNED, OWN = 5.0, 1.4
SETTLES, FOLLOWED = 6.0, 1.6
"""beta = 1 - RETURNED/N, personal gain = OWN/N of a group of N clients, if the run is long enough.

A client's own delta comes back to it through what is shared, g / (N (1 - beta)) of it in all: from
five clients on, a fifth for g = 1, however many there are. With the same beta a small group
overfits by momentum, and a large one is slow without. Fitted to 2, 10 and 50 clients.

In R rounds a velocity that remembers more than R/SETTLES of them does not settle, and what is
personal should be followed FOLLOWED times over: 1 - SETTLES/R and FOLLOWED/R are the bounds, at
R = 60 those of 50 clients (docs/parallel.md has 100 clients and 20 rounds)."""
Mover = Heads | Ledger


@dataclass(frozen=True)
class GroupBatch:
    """The updates of one head group in one step.

    Attributes
    ----------
    group : the heads.
    members : ALL clients of the group.
    features_CNH : the trunk's output for them.
    rows : which of these clients sent the updates, one row each; may repeat.
    deltas : (P_i,) each.
    shares : (n,) float32, positive; shares of the whole step.
    fixed : the features never change: nobody wants their gradient, and a `Ledger` may be kept.
    """

    key: str
    group: HeadGroup
    members: Sequence[str]
    features_CNH: Tensor
    rows: Sequence[int]
    deltas: Sequence[Tensor]
    shares: Tensor
    fixed: bool = False

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
    rounds : of the whole run.
    follows : the updates are followed whole, at a personal gain of 1: the global model's mean delta
        is FedAvg's step. (A full SHARED step for it too, next to the clients' own, diverges.)
    """

    factor: float
    rounds: float = math.inf
    follows: bool = False

    @staticmethod
    def of_pass(batch: GroupBatch) -> float:
        """Return the part of a pass over the group's clients that these updates are, at most 1."""
        return min(1.0, len(batch) / batch.num_clients)

    def momentum(self, section: UpdateSection, num_clients: int) -> float:
        """Return beta of a whole pass over N clients."""
        if section.shared_momentum != BY_SIZE:
            return section.shared_momentum
        return max(0.0, 1 - max(RETURNED / num_clients, SETTLES / self.rounds))

    def personal_gain(self, section: UpdateSection, num_clients: int) -> float:
        """Return how much of what is an update's own is followed, of N clients."""
        if self.follows:
            return self.factor
        if section.personal_gain != BY_SIZE:
            return section.personal_gain * self.factor
        return min(1.0, max(OWN / num_clients, FOLLOWED / self.rounds)) * self.factor


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
        self._crowded: set[str] = set()

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
        self._name_crowd(batch)
        moves = moves and all(_is_finite(delta) for delta in batch.deltas)
        within = batch.shares / batch.shares.sum()
        pulled = torch.zeros(group.num_chunks, n, group.hidden_dim, device=within.device)
        squares = torch.zeros(n, dtype=torch.float64, device=within.device)
        mean_square = torch.zeros((), dtype=torch.float64, device=within.device)
        with self._mover(batch).step() if moves else nullcontext() as mover:
            for packed_ncS, work in group.packed(batch.deltas, scratch):
                delta_cnS = packed_ncS.transpose(0, 1)
                mean_cS = torch.matmul(within, delta_cnS)
                squares += torch.linalg.vector_norm(packed_ncS, dim=2).double().square().sum(1)
                mean_square += torch.linalg.vector_norm(mean_cS, dim=1).double().square().sum()
                if not batch.fixed:
                    torch.bmm(delta_cnS, group.weight[work].transpose(1, 2), out=pulled[work])
                if mover is not None:
                    self._move(batch, pace, work, mover, (delta_cnS, mean_cS))
        pulled *= batch.shares[:, None]
        return HeadPullback(pulled, squares, mean_square, torch.zeros_like(mean_square))

    def _name_crowd(self, batch: GroupBatch) -> None:
        """Say once where a group has more clients than its heads can tell apart."""
        count, hidden = batch.num_clients, batch.group.hidden_dim
        if count - 1 <= hidden or batch.key in self._crowded:  # centred features: rank N - 1
            return
        self._crowded.add(batch.key)
        logger.warning(
            "%d clients share heads of hidden-dim %d: some %.0f %% of what is a client's own "
            "reaches it, the rest is felt by the others. Set hidden-dim to %d or more; the "
            "server's memory grows with it.",
            count,
            hidden,
            100 * hidden / (count - 1),
            count - 1,
        )

    def _mover(self, batch: GroupBatch) -> Mover:
        """Choose how the heads are moved: at once, or where it is cheaper by and by."""
        group, damping = batch.group, self._section.kernel_damping
        if batch.fixed and batch.num_clients <= group.hidden_dim // 2:
            return group.open_ledger(batch.members, batch.features_CNH, damping)
        return Heads((group.weight, group.bias), batch.features_CNH, damping)

    def _move(
        self,
        batch: GroupBatch,
        pace: Pace,
        work: slice,
        mover: Mover,
        now: tuple[Tensor, Tensor],
    ) -> None:
        """Move some chunks: what is shared by the bias, what is personal by the weight."""
        delta_cnS, mean_cS = now
        n, section = len(batch), self._section
        memory = self._remembered(batch)
        part = pace.of_pass(batch)
        beta = pace.momentum(section, batch.num_clients) ** part
        memory.mean[work].lerp_(mean_cS, min(1.0, n / batch.num_clients))
        velocity_cS = memory.velocity[work].mul_(beta).add_(mean_cS, alpha=part)
        shared_cS = mean_cS.add(velocity_cS, alpha=beta) if beta else mean_cS
        mover.share(work, shared_cS, min(1.0, section.shared_gain * part) * pace.factor)
        own_gain = pace.personal_gain(section, batch.num_clients)
        if own_gain:
            own_cnS = delta_cnS.sub_(memory.mean[work][:, None])
            gains_n = own_gain * (batch.shares * (n / batch.shares.sum()))
            mover.own(work, batch.rows, own_cnS, gains_n)

    def _remembered(self, batch: GroupBatch) -> GroupMemory:
        known = self._memory.get(batch.key)
        if known is None:
            blank = torch.zeros(
                batch.group.num_chunks, batch.group.chunk_size, device=batch.shares.device
            )
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


def _is_finite(delta: Tensor) -> bool:
    """Say whether every entry is finite, in one pass; a norm beyond float32 counts as not."""
    return bool(torch.isfinite(torch.linalg.vector_norm(delta)))
