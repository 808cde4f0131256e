"""Mean vectors by class, as they travel: features (FedProto, FedGH, FedTGP) or logits (FD).

Only the classes that are there travel: counts (C,) and the means of those with a count above 0.

Shapes: C classes, D size of one vector, N examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common.compression import Float32
from common.errors import WireError
from common.messages import MEANS
from common.records import COUNTS, LARGEST, Received, require_norm


@dataclass(frozen=True)
class ClassMeans:
    """counts (C,) int64 and means (C, D) float32, zero where the count is 0."""

    counts: NDArray[np.int64]
    means: Float32

    @classmethod
    def of(cls, vectors: Float32, labels: NDArray[np.int64], num_classes: int) -> Self:
        """Average vectors (N, D) by their labels (N,), in float64."""
        sums = np.zeros((num_classes, vectors.shape[1]))
        np.add.at(sums, labels, vectors)
        counts = np.bincount(labels, minlength=num_classes)
        return cls(counts, (sums / np.maximum(counts, 1)[:, None]).astype(np.float32))

    @classmethod
    def read(
        cls,
        received: Received,
        num_classes: int,
        dim: int,
        *,
        most: int = LARGEST,
        max_norm: float = math.inf,
    ) -> Self:
        """Read what `arrays` makes, of at most `most` examples; raise WireError if it is not it."""
        counts = received.counts(num_classes)
        if counts.sum() > most:
            raise WireError(f"counts add up to {counts.sum()}; the client has {most} examples.")
        present = counts > 0
        means = np.zeros((num_classes, dim), dtype=np.float32)
        meaning = f"{dim} entries for each class with a count above 0."
        found = received.vector(MEANS, int(present.sum()) * dim, meaning=meaning)
        means[present] = found.reshape(-1, dim)
        require_norm(means, MEANS, max_norm)
        return cls(counts, means)

    def arrays(self) -> dict[str, Float32]:
        """Return the vectors to send."""
        present = self.means[self.counts > 0].reshape(-1)
        return {COUNTS: self.counts.astype(np.float32), MEANS: present.astype(np.float32)}

    def presence(self) -> Self:
        """Return the same means with counts of 1: who has how many examples is nobody's affair."""
        return type(self)((self.counts > 0).astype(np.int64), self.means)


def pool(uploads: Sequence[ClassMeans]) -> ClassMeans:
    """Average clients' means class by class, weighted by their counts (FedProto, equation 6).

    Differs from paper: without its further factor 1/|N_j|, which would shrink the mean.
    """
    counts = np.sum([upload.counts for upload in uploads], axis=0)
    sums = np.sum([u.means.astype(np.float64) * u.counts[:, None] for u in uploads], axis=0)
    return ClassMeans(counts, (sums / np.maximum(counts, 1)[:, None]).astype(np.float32))
