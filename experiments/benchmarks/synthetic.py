"""Stand-ins: pictures of CIFAR-100's shape, and a client that has next to nothing to do.

Imported by name ("experiments.benchmarks.synthetic:pictures") in the processes of the clients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NUM_CLASSES = 100
IDLE_PARAMETERS, LIGHT_PARAMETERS = 239_856, 20_000
"""Trainable scalars of the idle models: those of the CNN on CIFAR-100, and few."""


def pictures() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return 50,000 random pictures of 100 classes: the cost of CIFAR-100, nothing to learn."""
    return _draw(50_000)


def few_pictures() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return 2,000 random pictures: small, so that what remains is overhead."""
    return _draw(2_000)


def handful_pictures() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return 200 random pictures: enough to see that a run works."""
    return _draw(200)


def _draw(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng(11)
    images = rng.integers(0, 256, size=(count, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(count, dtype=np.int64) % NUM_CLASSES


class Idle(nn.Module):
    """So many parameters, almost no arithmetic: one row of the vector is a bias."""

    def __init__(self, num_classes: int, num_parameters: int = IDLE_PARAMETERS) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(num_parameters))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, ...) to logits (B, C) that do not depend on them."""
        return self.weight[: self.num_classes].expand(len(images), -1)


def idle_model(**sizes: Any) -> nn.Module:
    """Build the idle model (keywords in_channels, num_classes), as large as the CNN."""
    return Idle(int(sizes["num_classes"]))


def light_model(**sizes: Any) -> nn.Module:
    """Build an idle model of 20,000 parameters."""
    return Idle(int(sizes["num_classes"]), LIGHT_PARAMETERS)
