"""The embeddings that a hypernetwork has learned, from a run's checkpoint; and their map."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Array = NDArray[np.float64]

KEPT = "embeddings.safetensors"
PREFIX = "embeddings."


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
    temporary = folder / (KEPT + ".tmp")
    arrays = {PREFIX + name: a.astype(np.float32) for name, a in found.items()}
    save_file(arrays, temporary)
    os.replace(temporary, folder / KEPT)
    return True


def client_points(embeddings: dict[str, Array]) -> tuple[list[str], Array]:
    """Return one point for each client: the mean of its chunks' embeddings, (clients, embed_dim).

    Clients of different sizes have different numbers of chunks; the mean makes them comparable.
    """
    names = sorted(embeddings, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    return names, np.stack([embeddings[name].mean(axis=0) for name in names])


def principal_axes(points: Array) -> tuple[Array, tuple[float, float]]:
    """Project points (n, d) on their first two principal components.

    Returns
    -------
    Coordinates (n, 2), each component's sign chosen so that its largest entry is positive, and the
    fraction of the variance that each explains.
    """
    centred = points - points.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    coordinates = np.zeros((len(points), 2))
    count = min(2, len(s))
    coordinates[:, :count] = u[:, :count] * s[:count]
    largest = np.abs(coordinates).argmax(axis=0)
    signs = np.sign(coordinates[largest, [0, 1]])
    total = float((s**2).sum())
    shares = [float(s[i] ** 2) / total if i < count and total > 0 else 0.0 for i in range(2)]
    return coordinates * np.where(signs == 0, 1.0, signs), (shares[0], shares[1])


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
