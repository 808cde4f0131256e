"""Scales down deltas that are far larger than their group's usually are (docs/parallel.md).

A delta's norm is compared with the running median of the norms that its head group accepted before:
large models have large deltas. The comparison happens when a step is taken, over updates sorted by
client, so that it does not depend on the order in which replies arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch

from common.log import logger
from server_app.aggregation.base import Update

WINDOW, LEAST = 64, 5
"""Norms remembered for each group, and how many are needed before anything is clipped."""


class NormClip:
    """Running median norms by group.

    Parameters
    ----------
    factor : multiple of the median that a delta may have; 0 turns the clip off.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._norms: dict[str, deque[float]] = {}

    def clip_all(self, updates: Sequence[Update], group_of: Callable[[str], str]) -> list[Update]:
        """Return the updates, deltas (P_i,) of at most `factor` times their group's median norm.

        They come back sorted by client. All are compared with what was there before this call.
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
            norm, bound = _norm(update), bounds.get(key, float("inf"))
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


def _norm(update: Update) -> float:
    return float(torch.linalg.vector_norm(update.delta.double()))
