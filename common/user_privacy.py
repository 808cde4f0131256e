"""User-level privacy at the server: what one participant can change in what the others see.

A step sums deltas that are clipped to norm C, divides by their number n, which is public, and adds
Gaussian noise of standard deviation z C / n to every entry. A participant that drops out (its delta
counts as 0) moves the mean by at most C / n, one that sends anything else by at most 2 C / n.

Shapes: P parameters.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.accounting import DELTA, Spent, epsilon
from common.errors import CheckpointError, RunError
from common.files import read_json, replace_file

RELEASES = "user_privacy.json"
"""In a run's folder: how many steps released something of each participant."""


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
        self._ledger: Path | None = None

    def keep_in(self, folder: Path, *earlier: Path) -> None:
        """Keep the counts in a file of the run's folder; take over what is there, and in earlier.

        What a step made may be sent before the next checkpoint: who resumes from an older one does
        the step again, and has seen both. Raises CheckpointError where a file holds something else.
        """
        for path in (folder / RELEASES, *(other / RELEASES for other in earlier)):
            self.releases |= _read_counts(path)
        self._ledger = folder / RELEASES

    def noise_like(self, mean: Tensor, num_updates: int) -> Tensor:
        """Draw what is added to the mean (P,) of so many deltas."""
        drawn = self._rng.standard_normal(len(mean), dtype=np.float32)
        return torch.from_numpy(drawn).to(mean) * (self.noise * self.clip / num_updates)

    def count(self, participants: Iterable[str]) -> None:
        """Note that a step releases something of each of these, before anybody is sent it.

        Raises RunError where that cannot be written down.
        """
        self.releases.update(participants)
        if self._ledger is None:
            return
        try:
            replace_file(self._ledger, json.dumps(self.releases))
        except OSError as error:
            raise RunError(
                f"what was released cannot be written to {self._ledger}: {error}. A step whose "
                "privacy nobody could count is not taken: free some space, then resume."
            ) from error

    def row(self) -> dict[str, float]:
        """Return `user_epsilon`, of the participant that was in most steps, at delta 1e-5."""
        most = max(self.releases.values(), default=0)
        return {"user_epsilon": epsilon([Spent(self.noise, 1.0, most)], DELTA)}

    def restore(self, releases: Mapping[str, int]) -> None:
        """Load exported counts, or keep what is known where that is more."""
        self.releases |= Counter(releases)


def _read_counts(path: Path) -> Counter[str]:
    try:
        counts = read_json(path)
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            raise ValueError("a count is no whole number from 0 on")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not say what was released to whom: {error}. Without it the privacy that "
            "is spent would be told as less. Put back a copy of it, or begin a new run."
        ) from error
    return Counter(counts)
