"""SqueezeNet 1.0 and 1.1 (Iandola et al. 2016, arXiv 1602.07360), as torchvision builds them.

Layer names, order and results equal torchvision's, so its checkpoints load; a test compares the
two. Written out here because importing torchvision costs a client process many seconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (squeeze, expand) of the eight Fire modules, the same in both versions
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
# a max pool stands before these Fire modules
POOL_BEFORE = {"squeezenet1_0": (0, 3, 7), "squeezenet1_1": (0, 2, 4)}
STEM = {"squeezenet1_0": (96, 7), "squeezenet1_1": (64, 3)}


class Fire(nn.Module):
    """Squeeze to few channels by 1x1, expand by 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, 2 expand, H, W)."""
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """Stem, eight Fire modules, dropout, 1x1 convolution to the classes, average pool.

    The classifier is a convolution on 512 channels; there is no 64-d feature.
    """

    def __init__(self, version: str, *, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        channels, kernel = STEM[version]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, kernel, stride=2), nn.ReLU()]
        for index, (squeeze, expand) in enumerate(FIRES):
            if index in POOL_BEFORE[version]:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            layers.append(Fire(channels, squeeze, expand))
            channels = 2 * expand
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(channels, num_classes, 1), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, channels, H, W), 32x32 or larger, to logits (B, C)."""
        x = self.classifier(self.features(images))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
