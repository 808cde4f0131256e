"""The small residual networks of the paper, named after their number of residual BLOCKS.

method.md, "The method": conv3x3(16)+BN, then 10, 12 or 18 blocks of 16/32/64 channels. They are
not the ImageNet networks of the same names: ResNet18 here has 565,386 parameters for 10 classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.base import FEATURE_DIM, FeatureClassifier

WIDTHS = (16, 32, 64)
# blocks of 16, 32 and 64 channels; the first block of a wider stage is strided
STAGES = {"resnet10": (3, 3, 4), "resnet12": (1, 5, 6), "resnet18": (6, 6, 6)}


class ResidualBlock(nn.Module):
    """Two biased 3x3 convolutions with BatchNorm; ReLU after the sum.

    A block that widens has stride 2 and a biased 1x1 shortcut without BatchNorm.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        stride = 1 if narrow == wide else 2
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(wide)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(narrow, wide, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, narrow, H, W) to (B, wide, H / stride, W / stride)."""
        # in place: BatchNorm keeps its input for the backward pass, never its output
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y.add_(self.shortcut(x)), inplace=True)


class ResNet(FeatureClassifier):
    """A stem, residual stages of 16, 32 and 64 channels, average pool, head."""

    def __init__(self, stages: tuple[int, int, int], *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.stem = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[ResidualBlock] = []
        width = WIDTHS[0]
        for wide, depth in zip(WIDTHS, stages, strict=True):
            for _ in range(depth):
                blocks.append(ResidualBlock(width, wide))
                width = wide
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, channels, H, W) to features (B, 64); any size of 8 or more."""
        x = self.blocks(F.relu(self.bn(self.stem(images)), inplace=True))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
