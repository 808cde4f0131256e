"""The published CNN: 234,006 parameters for 3 channels and 10 classes (method.md, table)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.base import FEATURE_DIM, FeatureClassifier, require_input_size


class CNN(FeatureClassifier):
    """conv3x3(16) relu pool, conv3x3(32) relu pool, fc 108, fc 64, head."""

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 8 * 8, 108)
        self.fc2 = nn.Linear(108, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, channels, 32, 32) to features (B, 64)."""
        require_input_size(images, "cnn")
        # ReLU after the pool: the same values and gradients on a quarter of the entries
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(x))
