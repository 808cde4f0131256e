"""An aggregation rule, whichever it is: from updates to one step, and what the step did."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common.config import UpdateSection
from common.user_privacy import UserPrivacy
from server_app.hypernet.base import Network, by_group
from server_app.hypernet.groups import GroupDeltas, Update, members_by_group, rms_and_coherence

FINAL_FRACTION = 0.05
"""Of rates and gains, at the end of their cosine."""
SAMPLE = 8
"""Clients of a head group, and chunks of a client, that diagnostics look at."""


@dataclass(frozen=True)
class StepDiagnostics:
    """What one server step did, in plain numbers.

    Attributes
    ----------
    rms_delta : root mean square over all entries of all deltas.
    grad_norm : global norm before the clip.
    clip_scale : factor the clip put on the gradient, at most 1.
    learning_rate, embedding_learning_rate : after the decay.
    gain_factor : of the rates and of the gains, by the decay.
    coherence : |mean delta|^2 / mean |delta_i|^2, pooled over head groups; 1 when all agree (or
        there is one), 1/N when they are unrelated.
    mean_staleness, max_staleness : over the updates of the step.
    num_updates : how many deltas went in.
    rms_theta_change : effective_rate times rms_delta.
    effective_rate : how far the step moved theta, as a multiple of how far the deltas reach in the
        same places: 1 where theta goes exactly as far as the clients' training.
    applied : False when a delta or the gradient was not finite and the step was skipped.
    """

    rms_delta: float
    grad_norm: float
    clip_scale: float
    learning_rate: float
    embedding_learning_rate: float
    gain_factor: float
    coherence: float
    mean_staleness: float
    max_staleness: int
    num_updates: int
    rms_theta_change: float
    effective_rate: float
    applied: bool


def usable(updates: Sequence[Update]) -> list[Update]:
    """Return the updates with a weight, in an order that does not depend on their arrival.

    Raises ValueError where a weight is negative or not finite, or none is positive.
    """
    for update in updates:
        if not 0 <= update.weight < math.inf:
            raise ValueError(
                f"the update of client {update.client_id!r} has weight {update.weight}; weights "
                "are finite and not negative."
            )
    used = [update for update in updates if update.weight > 0]
    if not used:
        raise ValueError(
            f"a step needs an update with a positive weight; got {len(updates)} without."
        )
    return sorted(used, key=lambda update: (update.client_id, update.staleness))


def schedule_factor(section: UpdateSection, progress: float, total_rounds: float) -> float:
    """Return the factor of all rates and gains after `progress` rounds.

    Constant, or a cosine from 1 at lr-decay-from (a fraction of all rounds) to FINAL_FRACTION at
    total_rounds.
    """
    begin = section.lr_decay_from * total_rounds
    if begin >= total_rounds:
        return 1.0
    done = min(max((progress - begin) / (total_rounds - begin), 0.0), 1.0)
    return FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 + math.cos(math.pi * done)) / 2


class Probe:
    """Compares how far a step moves theta with how far its deltas reach, in the same entries.

    It looks at a few chunks of a few clients of every head group, the first and the last among
    them, when it is made and again when `moved` is called.
    """

    def __init__(self, hypernet: Network, deltas: Sequence[tuple[str, Tensor]]) -> None:
        self._hypernet = hypernet
        groups = members_by_group([client_id for client_id, _ in deltas], hypernet.group_key)
        self._groups = {key: [deltas[i] for i in found] for key, found in groups.items()}
        self._before = {key: self._sample(key) for key in groups}

    def moved(self) -> float:
        """Return rms(change of theta) / rms(deltas); 0 where the deltas looked at are all zero.

        A client with several deltas counts as often; a head group weighs by its deltas' entries.
        """
        change_square = delta_square = 0.0
        for key, deltas in self._groups.items():
            before, after, chunks = self._before[key], self._sample(key), self._chunks(key)
            seen = [(client_id, delta) for client_id, delta in deltas if client_id in before]
            size = self._hypernet.section.chunk_size
            entries = sum(len(delta) for _, delta in deltas)
            change_square += entries * _mean_square([after[c] - before[c] for c, _ in seen])
            delta_square += entries * _mean_square([_take(d, chunks, size) for _, d in seen])
        return math.sqrt(change_square / delta_square) if delta_square > 0 else 0.0

    def _sample(self, key: str) -> dict[str, Tensor]:
        known = sorted({client_id for client_id, _ in self._groups[key]})
        chosen = [known[i] for i in _spread(len(known))]
        return self._hypernet.generate(chosen, self._chunks(key))

    def _chunks(self, key: str) -> list[int]:
        return _spread(self._hypernet.groups[key].num_chunks)


def _mean_square(vectors: list[Tensor]) -> float:
    return float(torch.cat(vectors).double().square().mean())


def _take(delta: Tensor, chunks: Sequence[int], size: int) -> Tensor:
    """Return the entries of a delta (P,) that lie in these chunks."""
    return torch.cat([delta[size * j : size * (j + 1)] for j in chunks])


def _spread(count: int) -> list[int]:
    """Spread at most `SAMPLE` of `count` positions evenly from the first to the last.

    >>> _spread(79), _spread(3)
    ([0, 11, 22, 33, 44, 55, 66, 78], [0, 1, 2])
    """
    return sorted({i * (count - 1) // (SAMPLE - 1) for i in range(SAMPLE)})


@dataclass(frozen=True)
class Moved:
    """The 2-norm of the gradient that a step followed, not finite where it did not; its clip."""

    grad_norm: float = 0.0
    clip_scale: float = 1.0


class Rule(ABC):
    """Moves a hypernetwork along the updates of its clients.

    Clients and head groups may be added to the hypernetwork at any time.

    Attributes
    ----------
    frozen_groups : head groups that do not learn; see `freeze`.
    """

    def __init__(self, hypernet: Network, section: UpdateSection, *, total_rounds: float) -> None:
        self.hypernet = hypernet
        self.section = section
        self.total_rounds = total_rounds
        self.frozen_groups: frozenset[str] = frozenset()
        self.privacy: UserPrivacy | None = None

    def step(self, updates: Sequence[Update], *, progress: float) -> StepDiagnostics:
        """Take one step along the updates; change phi and the embeddings in place.

        Updates come in any order; weight 0 leaves one out. `progress` is the number of rounds done
        when the step is taken, fractions included, and drives the decay. Raises RegistrationError
        where a client has no embedding, ValueError without an update of positive weight or at a
        delta of the wrong size.
        """
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
        """Take one step for the global model w_g = h(v_g; phi) (docs/method.md, "MH-pFedHNGD").

        `client_id` owns v_g; the updates bring delta_g,i, all of w_g's size, and weigh by their
        numbers of examples: the step follows their mean. Raises as `step`.
        """
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
        """Let these head groups, and a trunk, never move again; embeddings and new groups learn."""
        self.frozen_groups = frozenset(groups)

    def free_unused(self) -> None:
        """Forget the head groups that no client is left of; frozen ones stay."""
        network = self.hypernet
        used = {network.group_key(client_id) for client_id in network.clients()}
        used |= self.frozen_groups
        network.groups = {key: group for key, group in network.groups.items() if key in used}

    @abstractmethod
    def move(self, parts: Sequence[GroupDeltas], factor: float, *, is_global: bool) -> Moved:
        """Move the hypernetwork; `factor` is the decay, `is_global` where w_g alone moves."""

    def rates(self, factor: float) -> tuple[float, float]:
        """Return the rates of a gradient step of phi and of the embeddings; 0 where none is."""
        return 0.0, 0.0

    def privacy_row(self) -> dict[str, float]:
        """Return columns of metrics.jsonl that say what privacy was spent."""
        return self.privacy.row() if self.privacy else {}

    @abstractmethod
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export what the rule remembers: tensors, which stay shared, and JSON-able facts."""

    @abstractmethod
    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state into a rule whose hypernetwork has been restored.

        Raises CheckpointError where it does not fit the hypernetwork, or a tensor is missing.
        """

    def _take(
        self,
        parts: Sequence[GroupDeltas],
        used: Sequence[Update],
        progress: float,
        *,
        is_global: bool = False,
    ) -> StepDiagnostics:
        """Move; nothing moves where a delta is not finite."""
        factor = schedule_factor(self.section, progress, self.total_rounds)
        rms_delta, coherence = rms_and_coherence(parts)
        did, moved = Moved(rms_delta), 0.0
        if math.isfinite(rms_delta):
            deltas = [pair for p in parts for pair in zip(p.client_ids, p.deltas, strict=True)]
            probe = Probe(self.hypernet, deltas)
            did = self.move(parts, factor, is_global=is_global)
            moved = probe.moved()
        learning_rate, embedding_learning_rate = self.rates(factor)
        return StepDiagnostics(
            rms_delta=rms_delta,
            grad_norm=did.grad_norm,
            clip_scale=did.clip_scale,
            learning_rate=learning_rate,
            embedding_learning_rate=embedding_learning_rate,
            gain_factor=factor,
            coherence=coherence,
            mean_staleness=sum(update.staleness for update in used) / len(used),
            max_staleness=max(update.staleness for update in used),
            num_updates=len(used),
            rms_theta_change=moved * rms_delta if moved else 0.0,
            effective_rate=moved,
            applied=math.isfinite(did.grad_norm),
        )


def mean_diagnostics(steps: Sequence[StepDiagnostics]) -> dict[str, float]:
    """Average the diagnostics of a round's server steps; of max_staleness take the largest."""
    if not steps:
        return {}
    rows = [vars(step) for step in steps]
    means = {key: fmean(float(row[key]) for row in rows) for key in rows[0]}
    return means | {"max_staleness": float(max(step.max_staleness for step in steps))}


def global_diagnostics(step: StepDiagnostics | None) -> dict[str, float]:
    """Name the diagnostics of w_g's own step, where there was one."""
    keys = ("rms_delta", "rms_theta_change", "effective_rate", "num_updates")
    return {} if step is None else {f"global_{key}": float(getattr(step, key)) for key in keys}
