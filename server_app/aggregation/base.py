"""What an aggregation rule takes and gives, whichever it is: updates, a step, its diagnostics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Protocol

import torch
from torch import Tensor

from common.config import UpdateSection
from common.log import logger
from server_app.hypernet.heads import members_by_group
from server_app.hypernet.network import Hypernetwork

FINAL_FRACTION = 0.05
"""Of rates and gains, at the end of their cosine."""
SAMPLE = 8
"""Clients of a head group, and chunks of a client, that diagnostics look at."""


WINDOW, LEAST = 64, 5
"""Norms remembered for each group, and how many are needed before anything is clipped."""


@dataclass(frozen=True)
class Update:
    """What one reply brings: delta (P_i,), float32; weights are relative within a step.

    `staleness` counts the server steps between the dispatch and the arrival.
    """

    client_id: str
    delta: Tensor
    weight: float = 1.0
    staleness: int = 0


@dataclass(frozen=True)
class StepDiagnostics:
    """What one server step did, in plain numbers.

    Attributes
    ----------
    rms_delta : root mean square over all entries of all deltas.
    grad_norm : global norm before the clip.
    clip_scale : factor the clip put on the gradient, at most 1.
    learning_rate, embedding_learning_rate : after the decay.
    gain_factor : of both rates and of the gains of "least-squares", by the decay.
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


class Rule(Protocol):
    """Moves a hypernetwork along the updates of its clients.

    Clients and head groups may be added to the hypernetwork at any time.
    """

    hypernet: Hypernetwork

    @property
    def frozen_groups(self) -> frozenset[str]:
        """Head groups that do not learn; see `freeze`."""

    def step(self, updates: Sequence[Update], *, progress: float) -> StepDiagnostics:
        """Take one step along the updates; change phi and the embeddings in place.

        Updates come in any order; weight 0 leaves one out. `progress` is the number of rounds done
        when the step is taken, fractions included, and drives the decay. Raises RegistrationError
        where a client has no embedding, ValueError without an update of positive weight or at a
        delta of the wrong size.
        """

    def step_global(
        self, client_id: str, updates: Sequence[Update], *, progress: float
    ) -> StepDiagnostics:
        """Take one step for the global model w_g = h(v_g; phi) (docs/method.md, "MH-pFedHNGD").

        `client_id` owns v_g; the updates bring delta_g,i, all of w_g's size, and weigh by their
        numbers of examples. Raises as `step`.
        """

    def freeze(self, groups: Iterable[str]) -> None:
        """Let trunk and these head groups never move again; embeddings and new groups learn."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export what the rule remembers: tensors, which stay shared, and JSON-able facts."""

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state into a rule whose hypernetwork has been restored.

        Raises CheckpointError where it does not fit the hypernetwork, or a tensor is missing.
        """


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


class NormClip:
    """Scales down deltas that are far larger than their group's usually are (docs/parallel.md).

    A delta may have `factor` times (0: any) the running median of the norms that its head group
    accepted before: large models have large deltas.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._norms: dict[str, deque[float]] = {}

    def clip_all(self, updates: Sequence[Update], group_of: Callable[[str], str]) -> list[Update]:
        """Return the updates, deltas (P_i,) of at most `factor` times their group's median norm.

        They come back sorted by client. All are compared with what was there before this call, so
        that nothing depends on the order in which replies arrived.
        """
        if not self._factor:
            return list(updates)
        bounds = {
            key: self._factor * median(norms)
            for key, norms in self._norms.items()
            if len(norms) >= LEAST
        }
        clipped: list[Update] = []
        for update in sorted(updates, key=lambda u: (u.client_id, u.staleness)):
            key = group_of(update.client_id)
            norm = float(torch.linalg.vector_norm(update.delta.double()))
            bound = bounds.get(key, math.inf)
            if norm > bound:
                logger.warning(
                    "Delta of client %s has norm %.3g; scaled down to %.3g (clip-to-median)",
                    update.client_id,
                    norm,
                    bound,
                )
                update, norm = replace(update, delta=update.delta * (bound / norm)), bound
            self._norms.setdefault(key, deque(maxlen=WINDOW)).append(norm)
            clipped.append(update)
        return clipped

    def export(self) -> dict[str, list[float]]:
        """Return the remembered norms for a checkpoint."""
        return {group: list(norms) for group, norms in self._norms.items()}

    def restore(self, saved: Mapping[str, Sequence[float]]) -> None:
        """Load exported norms."""
        self._norms = {group: deque(norms, maxlen=WINDOW) for group, norms in saved.items()}


class Probe:
    """Compares how far a step moves theta with how far its deltas reach, in the same entries.

    It looks at a few chunks of a few clients of every head group, the first and the last among
    them, when it is made and again when `moved` is called.
    """

    def __init__(self, hypernet: Hypernetwork, deltas: Sequence[tuple[str, Tensor]]) -> None:
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
