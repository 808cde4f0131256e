"""A small vision transformer for 32x32 images: about 0.3 million parameters.

Ours, after Dosovitskiy et al. 2021 (arXiv 2010.11929): patches of 4, learned positions, pre-norm
blocks; the mean over patches in place of a class token; no dropout.

Shapes: B batch, T = 64 patches, D = 64 width, N heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.base import (
    FEATURE_DIM,
    INPUT_SIZE,
    FeatureClassifier,
    require_input_size,
)

PATCH = 4
DEPTH = 6
NUM_HEADS = 4
MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_btd: Tensor) -> Tensor:
        """Mix the patches (B, T, D) with each other."""
        batch, patches, width = x_btd.shape
        qkv = self.qkv(x_btd).view(batch, patches, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, patches, width))
        return result


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron, each added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, NUM_HEADS)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )

    def forward(self, x_btd: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_btd = x_btd + self.attention(self.norm1(x_btd))
        result: Tensor = x_btd + self.mlp(self.norm2(x_btd))
        return result


class ViT(FeatureClassifier):
    """Patch embedding, positions, six blocks, norm, mean over patches, head."""

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__(num_classes)
        num_patches = (INPUT_SIZE // PATCH) ** 2
        self.patches = nn.Conv2d(in_channels, FEATURE_DIM, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.empty(1, num_patches, FEATURE_DIM))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block(FEATURE_DIM) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, channels, 32, 32) to features (B, 64)."""
        require_input_size(images, "vit")
        x_btd = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        pooled: Tensor = self.norm(self.blocks(x_btd)).mean(dim=1)
        return pooled
