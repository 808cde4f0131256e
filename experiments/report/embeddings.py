"""The embeddings that a hypernetwork has learned, from a run's checkpoint; and their map."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.files import replace_file
from experiments.report.settings import complete_settings

Array = NDArray[np.float64]

KEPT = "embeddings.safetensors"
PREFIX = "embeddings."
STILL = 1e-6
"""Largest entry of what rounding alone makes of a start that is drawn again."""


def load_embeddings(folder: Path) -> dict[str, Array]:
    """Read a run's newest embeddings: {client_id: (num_chunks, embed_dim)}.

    Only they are read of a checkpoint that may be gigabytes. {} where the run has none (a method
    without a hypernetwork, or no checkpoint yet) or they cannot be read.
    """
    newest = sorted((folder / "checkpoint").glob("checkpoint-*/tensors.safetensors"))
    for path in (*reversed(newest), folder / KEPT):
        if path.is_file() and (found := _read(path)):
            return found
    return {}


def keep_embeddings(folder: Path) -> bool:
    """Store the embeddings beside the checkpoint; return whether the checkpoint may go.

    The client ids are not lost: they are the tensors' names.
    """
    found = load_embeddings(folder)
    if not found:
        return not (folder / "checkpoint").exists() or _has_none(folder)
    arrays = {PREFIX + name: a.astype(np.float32) for name, a in found.items()}
    replace_file(folder / KEPT, save(arrays))
    return True


def learned(embeddings: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """Return what training added to each client's embedding: its value minus its random start.

    The start is drawn again from the run's seed. It can be hundreds of times as large as what is
    learned, so that a map of the raw values shows the dice. The global model's embedding is left
    out. A run whose embeddings stood still (`embedding-lr = 0`) has learned none: {}.
    """
    from common.seeding import torch_generator  # imports torch: seconds
    from server_app.clients import GLOBAL_ID

    full = complete_settings(config)
    moved = {}
    for client_id, value in embeddings.items():
        if client_id == GLOBAL_ID:
            continue
        generator = torch_generator(int(full["seed"]), "embedding", client_id=client_id)
        rows = _normal_rows(value.shape, generator)
        moved[client_id] = value - float(full["embedding-std"]) * rows
    return moved if any(np.abs(value).max() > STILL for value in moved.values()) else {}


def in_order(client_ids: Iterable[str]) -> list[str]:
    """Sort client ids, numbers by their value."""
    return sorted(client_ids, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))


def alignment(moved: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Return how much every two clients moved in the same direction: cosines (clients, clients).

    Chunk by chunk, over the chunks that both have: a larger model has more.
    """
    count = len(names)
    cosines = np.eye(count)
    for i in range(count):
        for j in range(i):
            shared = min(len(moved[names[i]]), len(moved[names[j]]))
            a, b = (moved[names[k]][:shared].ravel() for k in (i, j))
            size = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosines[i, j] = cosines[j, i] = float(a @ b) / size if size > 0 else 0.0
    return cosines


def principal_axes(similarity: Array) -> tuple[Array, tuple[float, float]]:
    """Place clients on the first two principal components of their directions.

    Principal component analysis of vectors of which the inner products (n, n) are given.

    Returns
    -------
    Coordinates (n, 2), each component's sign chosen so that its largest entry is positive, and the
    fraction of the variance that each explains.
    """
    count = len(similarity)
    centre = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(centre @ similarity @ centre)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    total = float(values.sum())
    places = np.zeros((count, 2))
    for axis in range(min(2, count)):
        column = vectors[:, axis] * np.sqrt(values[axis])
        places[:, axis] = column if column[np.abs(column).argmax()] >= 0 else -column
    shares = [float(value) / total if total > 0 else 0.0 for value in (*values, 0.0)[:2]]
    return places, (shares[0], shares[1])


def _normal_rows(shape: tuple[int, ...], generator: Any) -> Array:
    """Draw the standard normal rows from which the hypernetwork starts."""
    import torch

    return np.asarray(torch.randn(*shape, generator=generator).numpy(), np.float64)


def _read(path: Path) -> dict[str, Array]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = [key for key in tensors.keys() if key.startswith(PREFIX)]  # noqa: SIM118
            return {
                key[len(PREFIX) :]: np.asarray(tensors.get_tensor(key), np.float64) for key in names
            }
    except (OSError, SafetensorError, ValueError):
        return {}


def _has_none(folder: Path) -> bool:
    """Whether every checkpoint of a run can be read and holds no embeddings."""
    files = list((folder / "checkpoint").glob("checkpoint-*/meta.json"))
    try:
        return bool(files) and not any("hypernet" in json.loads(f.read_text()) for f in files)
    except (OSError, ValueError):
        return False
