"""Dropout whose randomness has an owner.

torch's dropout draws from the global generator, which every client of a process shares: results
would depend on who ran before, and on threads. Here a model gets a generator of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.errors import ModelError

log = logging.getLogger(__name__)

# number of leading axes that get an entry of the mask of their own; 0 means all axes
_MASK_AXES = {nn.Dropout: 0, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2}


@dataclass
class MaskFeed:
    """Stands in for the generators while several clients are trained at once (`training.batched`).

    With `masks` the layers use them in the order in which they are called; without, they note in
    `wanted` what they would draw: (shape, rate of those kept), the shape without the batch.
    """

    masks: Sequence[Tensor] | None = None
    wanted: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    used: int = 0

    def apply(self, x: Tensor, shape: Sequence[int], kept: float) -> Tensor:
        """Multiply x (B, ...) by the next mask, which is scaled already."""
        if self.masks is None:
            self.wanted.append((tuple(shape[1:]), kept))
            return x
        self.used += 1
        return x * self.masks[self.used - 1].to(x.dtype)


class GeneratorDropout(nn.Module):
    """Dropout of rate `p` that draws its mask from `generator`.

    `mask_axes` 0 drops single entries, 2 drops whole channels of (B, channels, ...).
    """

    def __init__(self, p: float, generator: torch.Generator, *, mask_axes: int = 0) -> None:
        super().__init__()
        self.p = p
        self.generator = generator
        self.mask_axes = mask_axes
        self.feed: MaskFeed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x with entries dropped in training mode, x itself in evaluation mode."""
        if not self.training or self.p == 0.0:
            return x
        if self.p >= 1.0:
            return x * 0.0
        axes = self.mask_axes or x.dim()
        shape = [size if axis < axes else 1 for axis, size in enumerate(x.shape)]
        if self.feed is not None:
            return self.feed.apply(x, shape, 1.0 - self.p)
        mask = torch.empty(shape, dtype=x.dtype, device=x.device)
        return x * draw_mask(mask, 1.0 - self.p, self.generator)

    def extra_repr(self) -> str:
        """Show the rate when the model is printed."""
        return f"p={self.p}"


def draw_mask(mask: Tensor, kept: float, generator: torch.Generator) -> Tensor:
    """Fill a mask in place: 1 / kept with probability `kept`, else 0."""
    return mask.bernoulli_(kept, generator=generator).div_(kept)


@contextmanager
def feeding(model: nn.Module, feed: MaskFeed) -> Iterator[None]:
    """Let the model's dropout layers ask `feed` instead of their generator."""
    layers = [layer for layer in model.modules() if isinstance(layer, GeneratorDropout)]
    for layer in layers:
        layer.feed = feed
    try:
        yield
    finally:
        for layer in layers:
            layer.feed = None


def seed_dropout(model: nn.Module, generator: torch.Generator) -> None:
    """Make every nn.Dropout, 1d, 2d and 3d of the model draw from `generator`, in place.

    The generator must live on the model's device. A second call hands over to another generator.
    Random calls inside a user's own `forward` (F.dropout) cannot be seen from here.

    Raises
    ------
    ModelError
        The model has another kind of dropout, whose draws could not be repeated.
    """
    for path, parent in list(model.named_modules()):
        if isinstance(parent, GeneratorDropout):
            parent.generator = generator
            continue
        if isinstance(rate := getattr(parent, "dropout", None), float) and rate > 0:
            log.warning(
                "%s (%s) applies dropout %s inside: its draws are not seeded and two runs may "
                "differ. Set it to 0 and add nn.Dropout where needed.",
                path or "the model", type(parent).__name__, rate,
            )  # fmt: skip
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(parent, name, _seeded(child, generator))


def _seeded(layer: nn.modules.dropout._DropoutNd, generator: torch.Generator) -> nn.Module:
    if type(layer) not in _MASK_AXES:
        raise ModelError(
            f"{type(layer).__name__} draws from torch's global generator and cannot be seeded "
            "per client. Use nn.Dropout, nn.Dropout1d, nn.Dropout2d or nn.Dropout3d."
        )
    seeded = GeneratorDropout(float(layer.p), generator, mask_axes=_MASK_AXES[type(layer)])
    return seeded.train(layer.training)
