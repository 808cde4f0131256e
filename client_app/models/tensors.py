"""Small models for examples that are no pictures: the common model of tables, series, texts.

Shapes: B batch, F columns, C classes, D = 64 the feature.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.base import FEATURE_DIM, FeatureClassifier
from common.errors import ModelError

VOCABULARY = 8192
"""Token ids beyond it share the entries of smaller ones (id modulo the vocabulary)."""
WIDTHS = (32, 64, FEATURE_DIM)


class Perceptron(FeatureClassifier):
    """Two hidden layers of 64 on vectors (B, F)."""

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.fc1 = nn.Linear(in_channels, 64)
        self.fc2 = nn.Linear(64, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map vectors (B, F) to features (B, 64)."""
        _require_axes(images, 1, "perceptron")
        return F.relu(self.fc2(F.relu(self.fc1(images))))


class Convolutional(FeatureClassifier):
    """Three convolutions of stride 2 and a mean over what is left: series, volumes, any size."""

    def __init__(self, axes: int, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.axes = axes
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        pairs = pairwise((in_channels, *WIDTHS))
        self.convolutions = nn.ModuleList(layer(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map (B, channels, ...), with so many axes behind, to features (B, 64)."""
        _require_axes(images, self.axes + 1, f"conv{self.axes}d")
        for layer in self.convolutions:
            images = F.relu(layer(images))
        return images.flatten(2).mean(2)


class TokenMean(FeatureClassifier):
    """The mean of the embeddings of all tokens but 0, which pads, and a hidden layer of 64."""

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.fc = nn.Linear(32, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map token ids (B, T) int64 to features (B, 64)."""
        if images.is_floating_point():
            raise ModelError(f"tokens takes whole numbers (B, T), got {images.dtype}.")
        _require_axes(images, 1, "tokens")
        there = (images != 0)[..., None]
        summed = (self.embedding(images % VOCABULARY) * there).sum(1)
        return F.relu(self.fc(summed / there.sum(1).clamp_min(1)))


def _require_axes(inputs: Tensor, axes: int, model: str) -> None:
    if inputs.ndim != axes + 1:
        raise ModelError(
            f"{model} takes examples of {axes} axes, got a batch {tuple(inputs.shape)}. Use "
            "another built-in model, or one of your own."
        )
