"""The embeddings that a hypernetwork has learned, and what the labels of clients have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.config import ClientSection
from common.errors import DataError
from common.files import replace_file
from experiments.report.runs import Run
from experiments.report.settings import complete_settings

Array = NDArray[np.float64]

KEPT = "embeddings.safetensors"
PREFIX = "embeddings."
NOT_THE_RUNS = {"cache-dir", "image-size"}
"""What the config of a run, which somebody may have handed over, does not decide here."""
STILL = 1e-6
"""Largest entry of what rounding alone makes of a start that is drawn again."""


def load_embeddings(folder: Path) -> dict[str, Array]:
    """Read a run's newest embeddings: {client_id: (num_chunks, embed_dim)}.

    Only they are read of a checkpoint that may be gigabytes. {} where the run has none (a method
    without a hypernetwork, or no checkpoint yet) or they cannot be read.
    """
    paths = [*_checkpoints(folder), folder / KEPT]
    return next((found for path in paths if (found := _read(path))), {})


def keep_embeddings(folder: Path) -> bool:
    """Store the embeddings beside the checkpoint; return whether the checkpoint may go.

    It may unless one cannot be read. The client ids are not lost: they are the tensors' names.
    """
    found = [_read(path) for path in _checkpoints(folder)]
    newest = next((embeddings for embeddings in found if embeddings), None)
    if newest:
        arrays = {PREFIX + name: a.astype(np.float32) for name, a in newest.items()}
        replace_file(folder / KEPT, save(arrays))
    return bool(newest) or None not in found


def learned(embeddings: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """Return what training added to each client's embedding: its value minus its start.

    Under the kernel rule that is zero; under Adam it is drawn again from the run's seed, and can be
    hundreds of times as large as what is learned, so that a map of the raw values shows the dice.
    Common models are left out. A run whose embeddings stood still has learned none: {}.
    """
    import torch  # takes seconds

    from common.seeding import torch_generator
    from server_app.clients import GLOBAL_ID

    full = complete_settings(config)
    moved = {}
    for client_id, value in embeddings.items():
        if client_id.startswith(GLOBAL_ID):
            continue
        moved[client_id] = value
        if full["server-rule"] != "kernel":
            generator = torch_generator(int(full["seed"]), "embedding", client_id=client_id)
            rows = torch.randn(*value.shape, generator=generator).numpy()
            moved[client_id] = value - float(full["embedding-std"]) * rows
    return moved if any(np.abs(value).max() > STILL for value in moved.values()) else {}


def alignment(moved: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Return how much every two clients moved in the same direction: cosines (clients, clients).

    Chunk by chunk, over the chunks that both have: a larger model has more.
    """
    cosines = np.eye(len(names))
    for i in range(len(names)):
        for j in range(i):
            shared = min(len(moved[names[i]]), len(moved[names[j]]))
            a, b = (moved[names[k]][:shared].ravel() for k in (i, j))
            size = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosines[i, j] = cosines[j, i] = float(a @ b) / size if size > 0 else 0.0
    return cosines


def principal_axes(similarity: Array) -> tuple[Array, tuple[float, float]]:
    """Place clients on the first two principal components of their directions.

    Principal component analysis of vectors of which the inner products (n, n) are given. Returns
    coordinates (n, 2), each component's sign chosen so that its largest entry is positive, and the
    fraction of the variance that each explains.
    """
    count = len(similarity)
    centre = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(centre @ similarity @ centre)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    places = vectors[:, :2] * np.sqrt(values[:2])
    signs = np.sign(np.take_along_axis(places, np.abs(places).argmax(axis=0)[None], axis=0))
    shares = values[:2] / (values.sum() or 1.0)
    return places * np.where(signs == 0, 1.0, signs), (float(shares[0]), float(shares[1]))


def label_shares(run: Run, clients: Sequence[str]) -> Array:
    """Return each client's label distribution (clients, classes); rows sum to 1.

    Raises MHpFedHNError where the data is not on this machine, or where clients are not the
    partitions of a simulation.
    """
    from client_app.data.examples import open_examples  # imports torch: seconds
    from client_app.data.partitions import client_indices

    keys = ClientSection.key_names() - NOT_THE_RUNS
    section = ClientSection.model_validate({k: v for k, v in run.config.items() if k in keys})
    if ":" in section.dataset:
        raise DataError("their labels come from code that the run names; it is not run here.")
    if not all(c.isdecimal() and int(c) < section.num_partitions for c in clients):
        raise DataError("these clients brought data of their own; their labels are not known here.")
    dataset = open_examples(section)
    if dataset.labels.ndim > 1:
        raise DataError("these examples have no classes to compare clients by.")
    counts = np.zeros((len(clients), dataset.num_classes))
    for place, client in enumerate(clients):
        rows = client_indices(dataset, section, partition_id=int(client), seed=run.seed)
        counts[place] = np.bincount(dataset.labels[rows], minlength=dataset.num_classes)
    shares: Array = counts / counts.sum(axis=1, keepdims=True)
    return shares


def overlap(shares: Array) -> Array:
    """Return the overlap of every two clients, from 0 (no common label) to 1 (equal shares).

    The sum over labels of the smaller share: 1 minus the total variation distance.
    """
    smaller: Array = np.minimum(shares[:, None, :], shares[None, :, :]).sum(axis=2)
    return smaller


def ordering(overlaps: Array) -> Array:
    """Give each client a number from 0 to 1 such that clients with common labels are near.

    The first axis of classical multidimensional scaling of the distances 1 - overlap.
    """
    axis = principal_axes(-0.5 * (1.0 - overlaps) ** 2)[0][:, 0]
    spread = axis.max() - axis.min()
    return (axis - axis.min()) / spread if spread > 1e-12 else np.full(len(axis), 0.5)


def rank_correlation(a: Array, b: Array) -> float | None:
    """Return Spearman's rank correlation of two vectors; ties share their mean rank.

    None where one of them is constant.
    """
    ranks: list[Array] = []
    for values in (a, b):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_ranks: Array = counts.cumsum() - counts / 2.0
        ranks.append(mean_ranks[places])
    constant = any(np.ptp(rank) == 0 for rank in ranks)
    return None if constant else float(np.asarray(np.corrcoef(ranks))[0, 1])


def _checkpoints(folder: Path) -> list[Path]:
    """Return the tensor files of a run's checkpoints, the newest first."""
    return sorted((folder / "checkpoint").glob("checkpoint-*/tensors.safetensors"), reverse=True)


def _read(path: Path) -> dict[str, Array] | None:
    """Read the embeddings in a file, which may hold none; None where it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = [key for key in tensors.keys() if key.startswith(PREFIX)]  # noqa: SIM118
            return {
                key[len(PREFIX) :]: np.asarray(tensors.get_tensor(key), np.float64) for key in names
            }
    except (OSError, SafetensorError, ValueError):
        return None
