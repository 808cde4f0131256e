"""The published MLP: 3072-128-64-C on 32x32 RGB (method.md, table)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.base import (
    FEATURE_DIM,
    INPUT_SIZE,
    FeatureClassifier,
    require_input_size,
)


class MLP(FeatureClassifier):
    """Two hidden layers of 128 and 64 on the flattened image."""

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.fc1 = nn.Linear(in_channels * INPUT_SIZE * INPUT_SIZE, 128)
        self.fc2 = nn.Linear(128, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, channels, 32, 32) to features (B, 64)."""
        require_input_size(images, "mlp")
        return F.relu(self.fc2(F.relu(self.fc1(images.flatten(1)))))
