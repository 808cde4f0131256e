"""Tiny files in the formats that the data sources read, with known content."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

REPOSITORY = Path(__file__).parents[3]
REAL_DATA = REPOSITORY.parent / "shared" / "data"


def random_pixels(count: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def encode(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    pixels: NDArray[np.uint8],
    labels: list[int] | NDArray[np.int64],
    *,
    columns: tuple[str, str] = ("img", "label"),
) -> Path:
    """Write what the hub has: a column of {"bytes", "path"} and a column of labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encode(p), "path": f"{i}.png"} for i, p in enumerate(pixels)]
    pq.write_table(pa.table({columns[0]: rows, columns[1]: list(labels)}), path)
    return path


def write_idx(path: Path, values: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
