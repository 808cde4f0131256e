"""The published VGG8: 268,814 parameters for 3 channels and 10 classes (method.md, table)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.base import FEATURE_DIM, FeatureClassifier, require_input_size

WIDTHS = (16, 16, 32, 32, 64, 64)
DROPOUT = 0.5


class VGG8(FeatureClassifier):
    """Three times (conv3x3, conv3x3, pool), fc 180, dropout, fc 64, dropout, head.

    The rate of dropout is torch's default, 0.5: method.md gives none. Layers before a ReLU start as
    He et al. 2015 (arXiv 1502.01852) say, and as torchvision's VGGs do: with torch's default,
    signals fade over eight layers without BatchNorm, and local training does not leave its start.
    """

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        inputs = (in_channels, *WIDTHS[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(narrow, wide, 3, padding=1)
            for narrow, wide in zip(inputs, WIDTHS, strict=True)
        )
        self.fc1 = nn.Linear(64 * 4 * 4, 180)
        self.dropout1 = nn.Dropout(DROPOUT)
        self.fc2 = nn.Linear(180, FEATURE_DIM)
        self.dropout2 = nn.Dropout(DROPOUT)
        self.head = nn.Linear(FEATURE_DIM, num_classes)
        for layer in (*self.convs, self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, channels, 32, 32) to features (B, 64)."""
        require_input_size(images, "vgg8")
        x = images
        for index, conv in enumerate(self.convs):
            x = conv(x)
            if index % 2 == 1:  # before ReLU: the same values and gradients, a quarter of the work
                x = F.max_pool2d(x, 2)
            x = F.relu(x)
        x = self.dropout1(F.relu(self.fc1(x.flatten(1))))
        feature: Tensor = self.dropout2(F.relu(self.fc2(x)))
        return feature
