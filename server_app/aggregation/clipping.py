"""Scales down deltas that are far larger than their group's usually are (parallel-updates.md).

A delta's norm is compared with the running median of the norms that its head group accepted before:
large models have large deltas. The comparison happens when a step is taken, over updates sorted by
client, so that it does not depend on the order in which replies arrived. A group that was split off
by similarity starts without norms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from common.log import logger
from server_app.aggregation.adam import ClientUpdate
from server_app.hypernet.groups import members_by_group

WINDOW, LEAST = 64, 5
"""Norms remembered for each group, and how many are needed before anything is clipped."""
EVERYBODY = "personal"
"""Key of the one median that older checkpoints have, over clients of all sizes: of no use."""


class NormClip:
    """Running median norms by group.

    Parameters
    ----------
    factor : multiple of the median that a delta may have; 0 turns the clip off.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._norms: dict[str, deque[float]] = {}

    def clip_all(
        self, updates: Sequence[ClientUpdate], group_of: Callable[[str], str]
    ) -> list[ClientUpdate]:
        """Clip each update within the group of its client; return them sorted by client."""
        if not self._factor:
            return list(updates)
        clipped: list[ClientUpdate] = []
        for key, positions in members_by_group([u.client_id for u in updates], group_of).items():
            clipped += self.clip(key, [updates[i] for i in positions])
        return sorted(clipped, key=_order)

    def clip(self, group: str, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Return the updates with deltas (P_i,) of at most `factor` times the median norm."""
        if not self._factor:
            return list(updates)
        known = self._norms.setdefault(group, deque(maxlen=WINDOW))
        bound = self._factor * median(known) if len(known) >= LEAST else None
        ordered = sorted(updates, key=_order)
        norms = [float(torch.linalg.vector_norm(u.delta.double())) for u in ordered]
        clipped = [_shrunk(u, n, bound) for u, n in zip(ordered, norms, strict=True)]
        known.extend(norm if bound is None else min(norm, bound) for norm in norms)
        return clipped

    def export(self) -> dict[str, list[float]]:
        """Return the remembered norms for a checkpoint."""
        return {group: list(norms) for group, norms in self._norms.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Load exported norms; an older checkpoint's, which are of no group, are left out."""
        kept = {group: norms for group, norms in saved.items() if group != EVERYBODY}
        self._norms = {group: deque(norms, maxlen=WINDOW) for group, norms in kept.items()}


def _order(update: ClientUpdate) -> tuple[str, int]:
    return update.client_id, update.staleness


def _shrunk(update: ClientUpdate, norm: float, bound: float | None) -> ClientUpdate:
    if bound is None or norm <= bound:
        return update
    logger.warning(
        "Delta of client %s has norm %.3g; scaled down to %.3g (clip-to-median)",
        update.client_id,
        norm,
        bound,
    )
    return replace(update, delta=update.delta * (bound / norm))
