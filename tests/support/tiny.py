"""A federation that trains in a second: easy 8x8 images and models of a few hundred parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from client_app.app import app as client_app
from common.config import RunConfig
from experiments.run.engines.inprocess import InProcessGrid, run_inprocess, simulated_nodes

NUM_CLASSES = 4


def patterns() -> tuple[np.ndarray, np.ndarray]:
    """480 grey 8x8 images: class c lights up quadrant c, under noise."""
    rng = np.random.default_rng(7)
    labels = np.arange(480) % NUM_CLASSES
    images = rng.integers(0, 90, size=(480, 8, 8))
    for i, label in enumerate(labels):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[i, row : row + 4, column : column + 4] += 120
    return images.astype(np.uint8), labels.astype(np.int64)


def coloured_patterns() -> tuple[np.ndarray, np.ndarray]:
    """The same in three channels."""
    images, labels = patterns()
    return np.stack([images, images // 2, images // 3], -1), labels


class Small(nn.Module):
    """Pool to 4x4, one hidden layer: 17 h + h + 4 h + 4 parameters."""

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return self.head(torch.relu(self.hidden(pooled)))


class Normed(nn.Module):
    """A small convolution with BatchNorm and dropout: buffers and randomness."""

    def __init__(self, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(nn.functional.adaptive_avg_pool2d(images, 8))))
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


def small(*, in_channels: int, num_classes: int) -> nn.Module:
    return Small(8, num_classes)


def wide(*, in_channels: int, num_classes: int) -> nn.Module:
    return Small(20, num_classes)


def normed(*, in_channels: int, num_classes: int) -> nn.Module:
    return Normed(num_classes)


def steady(*, in_channels: int, num_classes: int) -> nn.Module:
    return Normed(num_classes, dropout=0.0)


def explodes(*, in_channels: int, num_classes: int) -> nn.Module:
    class Explodes(Small):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("this model cannot run")

    return Explodes(8, num_classes)


HERE = "tests.support.tiny"
MIXED = f"{HERE}:small,{HERE}:wide,{HERE}:normed"

PRESET = f"""
description = "a tiny federation"
[engine]
name = "inprocess"
num-clients = 3
workers = 1
[config]
method = "mh-pfedhn"
rounds = 2
dataset = "{HERE}:patterns"
models = "{MIXED}"
partition = "iid"
image-size = 8
chunk-size = 64
hidden-dim = 16
embed-dim = 8
cache-dir = "cache"
validation-fraction = 0.0
measure-alone = false
"""
"""An experiment file; its last table takes more settings."""

PUBLISHED = {
    "method": "mh-pfedhn",
    "max-in-flight": 1,
    "buffer-size": 1,
    "server-rule": "adam",
    "clip-to-median": 0.0,
    "lr-decay-from": 1.0,
    "weight-decay": 0.0005,
    "distill-alpha": 0.2,
    "distill-temperature": 15.0,
}
"""The published algorithm, where the defaults differ from it."""


def tiny_config(folder: Path, **overrides: Any) -> RunConfig:
    """Settings of a six-client federation on the patterns; keys with underscores."""
    settings: dict[str, Any] = {
        **PUBLISHED,
        "validation-fraction": 0.0,
        "measure-alone": False,
        "rounds": 2,
        "dataset": f"{HERE}:patterns",
        "models": MIXED,
        "global-model": f"{HERE}:small",
        "num-partitions": 6,
        "partition": "iid",
        "cache-dir": str(folder / "cache"),
        "output-dir": str(folder / "run"),
        "image-size": 8,
        "batch-size": 16,
        "chunk-size": 64,
        "hidden-dim": 16,
        "embed-dim": 8,
        "embedding-std": 0.5,
        "server-lr": 0.003,
        "embedding-lr": 0.003,
        "learning-rate": 0.05,
        "message-timeout-s": 300.0,
        "wait-for-clients-s": 0.0,
        "min-clients": 1,
    }
    settings |= {key.replace("_", "-"): value for key, value in overrides.items()}
    return RunConfig.parse(settings)


def trusting(folder: Path, models: str = MIXED) -> dict[str, Any]:
    """What a participant with a client-id names itself, so that it takes part in a tiny run."""
    code = {"model": models, "dataset": f"{HERE}:patterns", "global-model": f"{HERE}:small"}
    return {**code, "cache-dir": str(folder / "cache"), "split-seed": 42}


Handler = Callable[[Message, Context], Message]


class Wrapped:
    """The real ClientApp behind a function that may spoil what one client does."""

    def __init__(self, spoil: Callable[[Message, Context, Handler], Message]) -> None:
        self._spoil = spoil

    def __call__(self, message: Message, context: Context) -> Message:
        return self._spoil(message, context, client_app)


def run_tiny(
    config: RunConfig,
    *,
    num_clients: int = 6,
    app: Any = client_app,
    workers: int = 1,
    node_configs: list[Mapping[str, Any]] | None = None,
    grid_type: type[InProcessGrid] = InProcessGrid,
) -> InProcessGrid:
    """Run the real ServerApp over an in-process grid; returns the grid for inspection."""
    return run_inprocess(
        config,
        node_configs or simulated_nodes(num_clients),
        workers=workers,
        client_app=app,
        grid_type=grid_type,
    )
