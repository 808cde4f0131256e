"""Training pictures, changed at random on the device: every epoch sees others.

Shapes: N examples, B batch, C channels, H = W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from client_app.models.building import drawing_from
from client_app.plugins import load_callable
from common.errors import ModelError

OwnAugmentation = Callable[[Tensor, torch.Generator], Tensor]
"""(examples (B, ...), a generator) -> the same examples, changed."""

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


def own_augmentation(name: str) -> OwnAugmentation | None:
    """Return the function that `augmentation` names, None where it names none.

    It gets a batch as it is stored, pictures uint8 (B, C, H, W), and may draw from torch, numpy and
    random: they are seeded from the generator. Raises ModelError where it cannot be imported.
    """
    if ":" not in name:
        return None
    found = load_callable(name, key="augmentation", error=ModelError, example="my_site:turned")

    def changed(examples: Tensor, generator: torch.Generator) -> Tensor:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        with drawing_from(int(seed)):
            made = found(examples)
        if not isinstance(made, Tensor) or (made.shape, made.dtype) != (
            examples.shape, examples.dtype,
        ):  # fmt: skip
            came = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made)
            raise ModelError(
                f"augmentation = {name!r} must return as many examples of the same shape and "
                f"type, {examples.dtype} {tuple(examples.shape)}; got {came}."
            )
        return made

    return changed
