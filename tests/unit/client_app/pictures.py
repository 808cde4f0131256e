"""Random pictures: as files in the formats that the data sources read, and as a client's data."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from client_app.data.examples import ClientData, load_client_data
from client_app.models.building import num_parameters
from common.config import ClientSection

REPOSITORY = Path(__file__).parents[3]


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


def client_data(num_train: int = 70, num_test: int = 20, classes: int = 10) -> ClientData:
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> Tensor:
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return images.contiguous(memory_format=torch.channels_last)

    def labels(count: int) -> Tensor:
        return torch.randint(classes, (count,), generator=generator)

    return ClientData(
        train_images=draw(num_train),
        train_labels=labels(num_train),
        test_images=draw(num_test),
        test_labels=labels(num_test),
        validation_images=draw(0),
        validation_labels=labels(0),
        mean=torch.tensor([0.5, 0.4, 0.3]),
        std=torch.tensor([0.2, 0.25, 0.3]),
        num_classes=classes,
        in_channels=3,
    )


def draw_theta(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(num_parameters(model), generator=generator) - 0.5) * 0.18


def changed(section: ClientSection, **changes: Any) -> ClientSection:
    return section.model_copy(update=changes)


def load(section: ClientSection, partition_id: int = 0, seed: int = 42) -> ClientData:
    cpu = torch.device("cpu")
    return load_client_data(section, partition_id=partition_id, seed=seed, device=cpu)
