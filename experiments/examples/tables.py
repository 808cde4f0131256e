"""A table that comes with scikit-learn, and networks for it, as participants return them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn


def breast_cancer() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return 569 rows of 30 standardised columns, and 0 for malignant, 1 for benign."""
    from sklearn.datasets import load_breast_cancer

    rows: Any
    rows, labels = load_breast_cancer(return_X_y=True)
    scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    return scaled.astype(np.float32), np.asarray(labels, np.int64)


def shallow(*, in_channels: int, num_classes: int) -> nn.Module:
    """Return a perceptron with one hidden layer: rows (B, in_channels) -> logits (B, C)."""
    return _layers(in_channels, 64, num_classes)


def wide(*, in_channels: int, num_classes: int) -> nn.Module:
    """Return a perceptron with a hidden layer of 256 before one of 64."""
    return _layers(in_channels, 256, 64, num_classes)


def deep(*, in_channels: int, num_classes: int) -> nn.Module:
    """Return a perceptron with four hidden layers of 64."""
    return _layers(in_channels, 64, 64, 64, 64, num_classes)


def _layers(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
