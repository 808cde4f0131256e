"""Training pictures, changed at random on the device: every epoch sees others.

Shapes: N examples, B batch, C channels, H = W image size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

CROP_FRACTION = 8
"""A crop moves a picture by at most its size divided by this: 4 of 32 pixels."""


def draw_moves(
    names: Collection[str], count: int, image_size: int, generator: torch.Generator
) -> Tensor:
    """Draw how each of N pictures is changed, (3, N) int64 on the generator's device.

    The rows: whether it is flipped (0 or 1), how far a crop begins below its top and to the right
    of its left edge (pixels; black beyond the edges). Zeros leave a picture as it is.
    """
    moves = torch.zeros(3, count, dtype=torch.int64, device=generator.device)
    if "flip" in names:
        moves[0].random_(0, 2, generator=generator)
    if "crop" in names:
        most = image_size // CROP_FRACTION
        moves[1:].random_(-most, most + 1, generator=generator)
    return moves


def moved(images: Tensor, moves: Tensor) -> Tensor:
    """Flip and crop uint8 images (B, C, H, W) as moves (3, B) say; channels-last memory."""
    height, width = images.shape[-2:]
    flip, down, right = moves[:, :, None]
    y = torch.arange(height, device=images.device) + down
    x = torch.arange(width, device=images.device) + right
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    x = torch.where(flip.bool(), width - 1 - x, x)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[batch, y[:, :, None], x[:, None]]
    return picked.mul_(inside[..., None]).permute(0, 3, 1, 2)
