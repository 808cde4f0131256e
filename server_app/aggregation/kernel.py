"""The kernel rule: theta goes where the deltas point, embeddings learn who is like whom.

Adam decides how far a HEAD's weight moves; how far theta moves follows from the features, and is
far too much for what all clients share and far too little for what is each one's own
(docs/parallel.md has the measurements). This rule moves the dual form (`hypernet.kernel`) instead,
in units of what the clients' own training moved. For n updates of a head group of N clients (all
that are known, present or not, w_g among them), p = n/N of a pass, f the decay, m_now the mean of
the deltas and m its running mean,

    m <- m + p (m_now - m), at first m_now                  u <- beta^p u + p m_now
    b <- b - min(1, g p) f (m_now + beta^p u)               what is shared: Nesterov momentum
    a_i <- a_i - r f (delta_i - m)                          what is the client's own
    v_i <- v_i + s(delta_i) - median_j s(delta_j)           who it is like

beta = max(0, min(1 - 5/N, t/(t + 3))) after t steps of the group: Nesterov's own sequence, whose
memory grows with what there is to remember (a long one overshoots the first rounds, when all deltas
agree), up to where a client's own delta comes back to it through what is shared, g / (N (1 - beta))
of it in all, to a fifth for g = 1. r = rho + (1 - rho)/N. g is `shared-gain`, rho `personal-gain`.
s is a sketch of a delta's last entries, and the median, number by number, over the newest of each.
A pass makes shared steps of g in all, in one piece or in N/n of them; no step has a gain above 1,
beyond which the first rounds diverge. In a group of too few to share each client moves by exactly
its own delta, in a vector that nobody takes from, and all else rests (`KernelNetwork.num_sharing`
says where, and why).

An embedding is what a client's own changes have added up to, in E numbers, and the cosine of two
the correlation of these sums. Differs from paper: there phi and v descend along J^T delta.

Shapes: C chunks of a group, S chunk size, P parameters of a client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import UpdateSection
from common.serialization import required_tensor
from common.user_privacy import UserPrivacy, clipped
from server_app.aggregation.base import Moved, Rule
from server_app.clients import GLOBAL_ID
from server_app.hypernet.groups import GroupDeltas
from server_app.hypernet.kernel import KernelNetwork

RETURNED = 5.0
"""beta is at most 1 - RETURNED / N."""
RAMP = 3.0
"""beta is t / (t + RAMP) in the first steps (Nesterov 1983)."""


@dataclass
class Memory:
    """What the rule remembers of a group.

    Velocity u and running mean m of the deltas, (C S,), and how many steps t it has made.
    """

    velocity: Tensor
    mean: Tensor
    steps: int = 0


@dataclass(frozen=True)
class Released(GroupDeltas):
    """Deltas clipped for user-level privacy; `noised` (width,) stands for their mean."""

    noised: Tensor

    @property
    def mean(self) -> Tensor:
        """Their mean with the noise of one step."""
        return self.noised


class KernelRule(Rule):
    """Moves a `KernelNetwork`.

    With `user-dp-noise` no embedding moves, so that the kernel stays the identity: what others see
    of a client went through the noised mean (`common.user_privacy`).
    """

    hypernet: KernelNetwork

    def __init__(
        self, hypernet: KernelNetwork, section: UpdateSection, *, total_rounds: float
    ) -> None:
        super().__init__(hypernet, section, total_rounds=total_rounds)
        self._memory: dict[str, Memory] = {}
        noise, clip = section.user_dp_noise, section.user_dp_clip
        self.privacy = UserPrivacy(noise, clip) if noise else None

    @torch.no_grad()
    def move(self, parts: Sequence[GroupDeltas], factor: float, *, is_global: bool) -> Moved:
        """Move what is shared, and what is each client's own; in frozen groups embeddings alone.

        w_g's mean delta is followed whole, r = 1, which is FedAvg's step; it is like nobody.
        """
        for part in parts:
            sending = part.client_ids
            if part.key in self.frozen_groups:
                sending = self.hypernet.members(part.key)  # nobody else's vectors move
            else:
                self.hypernet.note_senders(part.key, sending)
            if num_clients := self.hypernet.num_sharing(part.key, sending):
                self._move_together(self._released(part), num_clients, factor, is_global)
            else:
                self._move_alone(part, factor)
        return Moved()

    def _move_together(
        self, part: GroupDeltas, num_clients: int, factor: float, is_global: bool
    ) -> None:
        network, n = self.hypernet, len(part.deltas)
        memory, learns = self._memory_of(part), part.key not in self.frozen_groups
        beta, gain = gains(self.section.personal_gain, num_clients, memory.steps)
        gain = factor * (1.0 if is_global else gain)
        if learns:
            self._move_shared(part, memory, beta, min(1.0, n / num_clients), factor)
            for client_id, delta, weight in zip(
                part.client_ids, part.deltas, part.within, strict=True
            ):
                change = delta - memory.mean[: len(delta)]
                network.personal[client_id].sub_(change, alpha=gain * n * weight)
        if not is_global and self.privacy is None:
            self._move_embeddings(part, follows_usual=learns)

    def _move_embeddings(self, part: GroupDeltas, *, follows_usual: bool) -> None:
        """Move who each is like, against what is usual; in a group that rests, against nothing."""
        network, group = self.hypernet, self.hypernet.groups[part.key]
        sketches = [group.sketch(delta, network.section.embed_dim) for delta in part.deltas]
        if follows_usual:
            network.newest |= reversed([*zip(part.client_ids, sketches, strict=True)])
            usual = network.usual(part.key)
            sketches = [sketch - usual for sketch in sketches]
        for client_id, sketch in zip(part.client_ids, sketches, strict=True):
            network.embeddings[client_id] += sketch

    def free_unused(self) -> None:
        """See `Rule.free_unused`."""
        super().free_unused()
        self._memory = {k: m for k, m in self._memory.items() if k in self.hypernet.groups}

    def _released(self, part: GroupDeltas) -> GroupDeltas:
        """Clip each client's newest delta and noise their mean, where others may see it."""
        if (privacy := self.privacy) is None:
            return part
        newest = dict(reversed([*zip(part.client_ids, part.deltas, strict=True)]))
        deltas = [clipped(newest[client_id], privacy.clip) for client_id in sorted(newest)]
        plain = GroupDeltas(
            part.key,
            part.width,
            sorted(newest),
            deltas,
            torch.ones_like(part.shares[: len(deltas)]),
        )
        privacy.count(client_id.removeprefix(f"{GLOBAL_ID}/") for client_id in newest)
        noised = plain.mean + privacy.noise_like(plain.mean, len(deltas))
        return Released(part.key, part.width, plain.client_ids, deltas, plain.shares, noised)

    def _move_shared(
        self, part: GroupDeltas, memory: Memory, beta: float, portion: float, factor: float
    ) -> None:
        """Move m, u and b by `portion` p of a pass."""
        beta **= portion
        gain = min(1.0, self.section.shared_gain * portion) * factor
        memory.mean.lerp_(part.mean, portion)
        memory.velocity.mul_(beta).add_(part.mean, alpha=portion)
        base = self.hypernet.groups[part.key].base
        base.sub_(part.mean, alpha=gain).sub_(memory.velocity, alpha=gain * beta)
        memory.steps += 1

    def _move_alone(self, part: GroupDeltas, factor: float) -> None:
        """Move each client by the mean of its own deltas of this step, and nobody else, ever.

        In frozen groups too: who learned before sends no delta, and the new ones share nothing.
        """
        total: dict[str, float] = {}
        for client_id, weight in zip(part.client_ids, part.within, strict=True):
            total[client_id] = total.get(client_id, 0.0) + weight
        for client_id, delta, weight in zip(part.client_ids, part.deltas, part.within, strict=True):
            if client_id not in self.hypernet.alone:
                self.hypernet.alone[client_id] = self.hypernet.fresh_vector(client_id)
            self.hypernet.alone[client_id].sub_(delta, alpha=factor * weight / total[client_id])

    def _memory_of(self, part: GroupDeltas) -> Memory:
        if part.key not in self._memory:
            mean = part.mean * (part.key not in self.frozen_groups)  # nothing was learned there
            self._memory[part.key] = Memory(torch.zeros_like(mean), mean)
        return self._memory[part.key]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the memory as `kernel.<velocity|mean>.<key>`, lengths and steps by key."""
        tensors = {
            f"kernel.{name}.{key}": x
            for key, memory in self._memory.items()
            for name, x in (("velocity", memory.velocity), ("mean", memory.mean))
        }
        sizes = {key: [len(m.mean), m.steps] for key, m in sorted(self._memory.items())}
        releases = {"releases": dict(self.privacy.releases)} if self.privacy else {}
        return tensors, {"kernel": sizes, **releases}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state; see `Rule.load_state_dict`."""

        def own(name: str, key: str, length: int) -> Tensor:
            saved = required_tensor(tensors, f"kernel.{name}.{key}", (length,))
            return saved.to(self.hypernet.device, copy=True)

        self._memory = {
            key: Memory(own("velocity", key, length), own("mean", key, length), steps)
            for key, (length, steps) in facts["kernel"].items()
        }
        if self.privacy:
            self.privacy.restore(facts.get("releases", {}))


def gains(rho: float, num_clients: int, steps: int) -> tuple[float, float]:
    """Return beta of a whole pass, and r, of a group of N clients after t steps.

    >>> gains(0.25, 1, 3), gains(0.25, 50, 3), gains(0.25, 50, 100)
    ((0.0, 1.0), (0.5, 0.265), (0.9, 0.265))
    """
    beta = max(0.0, min(1 - RETURNED / num_clients, steps / (steps + RAMP)))
    return beta, rho + (1 - rho) / num_clients
