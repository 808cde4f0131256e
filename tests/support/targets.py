"""Three kinds of labels, a class, several or numbers: data, a model and a federation for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from common.config import RunConfig
from tests.support.tiny import tiny_config

HERE = __name__
Array = NDArray[Any]


def diabetes() -> tuple[Array, Array]:
    table = load_diabetes(scaled=True)
    return table.data * 20, table.target


def findings() -> tuple[Array, Array]:
    """Thirty columns; each of five labels is there where the sum of six of them is above 0."""
    inputs = np.random.default_rng(0).normal(0, 1, (500, 30)).astype(np.float32)
    return inputs, inputs.reshape(500, 5, 6).sum(2) > 0


def visits() -> dict[str, Any]:
    """A scan, a table and words: the class needs the brightness of one and a column of another."""
    rng = np.random.default_rng(1)
    labels = np.arange(480) % 4
    scan = rng.normal(0, 0.3, (480, 1, 6, 6)) + (labels % 2)[:, None, None, None]
    table = rng.normal(0, 0.3, (480, 5)) + (labels // 2)[:, None]
    words = rng.integers(0, 12, (480, 7))
    return {"inputs": {"scan": scan, "table": table, "words": words}, "labels": labels}


def mlp(*, in_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes))


class Joint(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scan = nn.Linear(36, 8)
        self.table = nn.Linear(5, 8)
        self.words = nn.Embedding(12, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, scan: Tensor, table: Tensor, words: Tensor) -> Tensor:
        found = self.scan(scan.flatten(1)) + self.table(table) + self.words(words).mean(1)
        return self.head(torch.relu(found))


def joint(*, in_channels: int, num_classes: int) -> nn.Module:
    return Joint(num_classes)


KINDS: dict[str, tuple[Callable[[], Any], Callable[..., nn.Module], float]] = {
    "numbers": (diabetes, mlp, 0.3),
    "labels": (findings, mlp, 0.8),
    "classes": (visits, joint, 0.85),
}


def federation(folder: Path, kind: str, **overrides: Any) -> RunConfig:
    """Three participants with one kind of labels, and a recipe that learns them in seconds."""
    source, factory, _ = KINDS[kind]
    settings = {
        "method": "mh-pfedhn-pg", "server_rule": "kernel", "rounds": 8, "local_epochs": 4,
        "dataset": f"{HERE}:{source.__name__}", "models": f"{HERE}:{factory.__name__}",
        "num_partitions": 3, "global_model": "auto", "optimizer": "adamw", "learning_rate": 0.01,
        "validation_fraction": 0.1, "measure_alone": True, "evaluate_every": 8,
    }  # fmt: skip
    return tiny_config(folder, **(settings | overrides))
