"""How much the labels of two clients overlap: known where the data is, so in a simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.client import ClientSection
from common.errors import DataError
from experiments.report.runs import Run

Array = NDArray[np.float64]


def label_shares(run: Run, clients: Sequence[str]) -> Array:
    """Return each client's label distribution (clients, classes); rows sum to 1.

    Raises
    ------
    MHpFedHNError
        The data is not on this machine, or clients are not the partitions of a simulation.
    """
    from client_app.data.examples import open_examples  # imports torch: seconds
    from client_app.data.partitions import client_indices

    section = client_section(run.config)
    if not all(c.isdecimal() and int(c) < section.num_partitions for c in clients):
        raise DataError("these clients brought data of their own; their labels are not known here.")
    dataset = open_examples(section)
    seed = int(run.config.get("seed", 0))
    counts = np.zeros((len(clients), dataset.num_classes))
    for place, client in enumerate(clients):
        rows = client_indices(dataset, section, partition_id=int(client), seed=seed)
        counts[place] = np.bincount(dataset.labels[rows], minlength=dataset.num_classes)
    shares: Array = counts / counts.sum(axis=1, keepdims=True)
    return shares


def overlap(shares: Array) -> Array:
    """Return the overlap of every two clients (clients, clients), 0 (no common label) to 1 (equal).

    The sum over labels of the smaller share: 1 minus the total variation distance.
    """
    smaller: Array = np.minimum(shares[:, None, :], shares[None, :, :]).sum(axis=2)
    return smaller


def ordering(overlaps: Array) -> Array:
    """Give each client a number from 0 to 1 such that clients with common labels are near.

    The first axis of classical multidimensional scaling of the distances 1 - overlap.
    """
    count = len(overlaps)
    squared = (1.0 - overlaps) ** 2
    centre = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(-0.5 * centre @ squared @ centre)
    axis = vectors[:, -1] * np.sqrt(max(values[-1], 0.0))
    axis = axis * (1.0 if axis[np.abs(axis).argmax()] >= 0 else -1.0)
    spread = axis.max() - axis.min()
    return (axis - axis.min()) / spread if spread > 1e-12 else np.full(count, 0.5)


def rank_correlation(a: Array, b: Array) -> float | None:
    """Return Spearman's rank correlation of two vectors; ties share their mean rank.

    None where one of them is constant.
    """
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale > 0 else None


def client_section(config: Mapping[str, Any]) -> ClientSection:
    """Return the data settings of a run's config."""
    own = {key: value for key, value in config.items() if key in ClientSection.key_names()}
    return ClientSection.model_validate(own)


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    means: Array = (last - (counts - 1) / 2.0)[inverse]
    return means
