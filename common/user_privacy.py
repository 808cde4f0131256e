"""User-level privacy at the server: what one participant can change in what the others see.

A step sums deltas that are clipped to norm C, divides by their number n, which is public, and adds
Gaussian noise of standard deviation z C / n to every entry. A participant that drops out (its delta
counts as 0) moves the mean by at most C / n, one that sends anything else by at most 2 C / n.

Shapes: P parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.accounting import DELTA, Spent, epsilon


def clipped(delta: Tensor, clip: float) -> Tensor:
    """Return a delta (P,) scaled down to norm `clip`, itself where it is shorter."""
    norm = float(torch.linalg.vector_norm(delta.double()))
    return delta * (clip / norm) if norm > clip else delta


class UserPrivacy:
    """Makes noise for the server's steps, and counts how often each participant was in one.

    `rng` replaces the operating system's randomness in tests alone: every participant knows the
    run's seed, and could take noise that is drawn from it away again.
    """

    def __init__(self, noise: float, clip: float, rng: np.random.Generator | None = None) -> None:
        self.noise, self.clip = noise, clip
        self._rng = rng or np.random.default_rng()
        self.releases: Counter[str] = Counter()

    def noise_like(self, mean: Tensor, num_updates: int) -> Tensor:
        """Draw what is added to the mean (P,) of so many deltas."""
        drawn = self._rng.standard_normal(len(mean), dtype=np.float32)
        return torch.from_numpy(drawn).to(mean) * (self.noise * self.clip / num_updates)

    def count(self, participants: Iterable[str]) -> None:
        """Note that a step released something of each of these."""
        self.releases.update(participants)

    def row(self) -> dict[str, float]:
        """Return `user_epsilon`, of the participant that was in most steps, at delta 1e-5."""
        most = max(self.releases.values(), default=0)
        return {"user_epsilon": epsilon([Spent(self.noise, 1.0, most)], DELTA)}

    def restore(self, releases: Mapping[str, int]) -> None:
        """Load exported counts."""
        self.releases = Counter(releases)
