"""Differentially private local training: DP-SGD (Abadi et al. 2016), per example.

A step samples every example with probability q = batch-size / n (Poisson), clips each one's
gradient to norm C, adds Gaussian noise of standard deviation z C to every entry of the sum, and
divides by the expected batch q n. An epoch is ceil(1 / q) steps.

Shapes: B examples of a step or a part of one, P parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from client_app.data.augment import draw_moves, moved
from client_app.data.examples import ClientData
from client_app.models.building import trainable
from client_app.models.instances import MaskFeed, draw_mask, feeding
from client_app.training.loop import (
    FlatModel,
    Loss,
    Trained,
    label_loss,
    logits_of,
    make_optimizer,
    mixed_precision,
)
from common.config import TrainingSection
from common.errors import ModelError

GRADIENT_BYTES = 16 * 2**20
"""Of the gradients of single examples that lie in memory at once."""
FEWEST_ROWS = 8
"""That are computed at once: torch has other kernels for one, two and three."""


def require_private(module: nn.Module) -> None:
    """Raise ModelError where a layer mixes the examples of a batch, which nothing can clip."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"{type(module).__name__} has a BatchNorm ({path}), which mixes the examples of a "
                "batch: dp-noise can bound no single one's influence. Use a model without (cnn, "
                "vgg8, mlp, squeezenet, vit), put nn.GroupNorm in its place, or set dp-noise = 0."
            )


@dataclass(frozen=True)
class Mechanism:
    """Noise multiplier z, norm C, and who samples and draws the noise."""

    noise: float
    clip: float
    rng: np.random.Generator


def plan(section: TrainingSection, num_examples: int) -> tuple[float, int]:
    """Return the sampling rate q of a step, and the steps of a round.

    >>> plan(TrainingSection(batch_size=16, local_epochs=2), 40)
    (0.4, 6)
    """
    rate = min(1.0, section.batch_size / num_examples)
    return rate, section.local_epochs * math.ceil(1 / rate)


@dataclass(frozen=True)
class PrivateStep:
    """Sums clipped gradients of single examples.

    `loss` is what is descended, None the `label_loss`; it is called with one example at a time.
    """

    model: FlatModel
    section: TrainingSection
    num_classes: int
    clip: float
    loss: Loss | None = None

    def summed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """Return the sum (P,) of the examples' clipped gradients, and of their losses.

        Images are (B, C, H, W), labels (B,). Raises ModelError where a layer cannot be followed.
        """
        total, losses = torch.zeros_like(self.model.theta), 0.0
        size = max(FEWEST_ROWS, GRADIENT_BYTES // (4 * self.model.num_parameters))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            gradients, values = self.of_padded(images[part], labels[part], size)
            total += clipped(gradients, self.clip).sum(dim=0)
            losses += float(values.sum())
        return total, losses

    def of_padded(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return every example's gradient (B, P), and loss (B,), computed with `size` rows.

        Kernels round differently for few rows and for many, and weights can be made that turn the
        last bit into all of a gradient: whether somebody else is in the batch must not show in it.
        """
        count = len(labels)
        rows = torch.arange(size, device=labels.device).clamp(max=count - 1)
        gradients, values = self.of_each(images[rows], labels[rows])
        return gradients[:count], values[:count]

    def of_each(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return every example's gradient (B, P), and loss (B,)."""
        module = self.model.module
        module.train()
        weights = {name: p.detach() for name, p in trainable(module).items()}
        masks = self._masks(images)
        each = vmap(grad_and_value(self._loss_of), (None, 0, 0, 0), randomness="different")
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
                found, values = each(weights, images, labels, masks)
        except RuntimeError as error:
            raise ModelError(
                f"{type(module).__name__}: the gradients of single examples, which dp-noise needs, "
                f"cannot be computed: {error}. Use layers that torch.func.vmap can follow (no "
                ".item(), no branch on values, no running statistics), or set dp-noise = 0."
            ) from error
        gradients = torch.cat([found[name].flatten(1) for name in weights], dim=1)
        return gradients, values.detach()

    def _loss_of(
        self, weights: dict[str, Tensor], image: Tensor, label: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        module, images, labels = self.model.module, image[None], label[None]
        with feeding(module, MaskFeed(masks)), mixed_precision(self.section, image.device):
            logits: Tensor = functional_call(module, weights, (images,))
            logits = logits.float()
        value = label_loss(logits, labels, self.section)
        return self.loss(images, logits, labels, value) if self.loss else value

    @torch.no_grad()
    def _masks(self, images: Tensor) -> list[Tensor]:
        """Draw what the dropout layers drop (B, 1, ...), in the order of their calls."""
        feed, module = MaskFeed(), self.model.module
        with feeding(module, feed):
            logits_of(module, images[:1], self.num_classes)
        shapes = [
            (torch.zeros(len(images), 1, *s, device=images.device), p) for s, p in feed.wanted
        ]
        generator = torch.Generator(images.device)
        generator.seed()
        return [draw_mask(mask, kept, generator) for mask, kept in shapes]


def clipped(gradients: Tensor, clip: float) -> Tensor:
    """Return gradients (B, P), none longer than `clip`; what is not finite counts as nothing.

    In double precision: in float32 the square of an entry below 1e-23 is 0, and a gradient of such
    entries would have no length, and pass as it is.
    """
    exact = gradients.double()
    norms = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    scaled = (exact * (clip / norms).clamp(max=1.0)).float()
    sound = norms.isfinite() & (norms > 0)
    return torch.where(sound, scaled, torch.zeros_like(scaled))


def train_privately(
    model: FlatModel,
    data: ClientData,
    section: TrainingSection,
    mechanism: Mechanism,
    *,
    loss: Loss | None = None,
) -> Trained:
    """Train in place like `loop.train`, so that no single example can be told from what changed.

    Neither the sampling nor the noise comes from the run's seed, so no two runs are alike. The mean
    loss returned is exact, and must not leave. Raises ModelError where the model has a BatchNorm or
    its layers cannot be followed.
    """
    require_private(model.module)
    started, rng, n = time.monotonic(), mechanism.rng, data.num_train
    rate, steps = plan(section, n)
    step = PrivateStep(model, section, data.num_classes, mechanism.clip, loss)
    optimizer = make_optimizer(model.theta, section)
    losses, seen = 0.0, 0
    for _ in range(steps):
        rows = poisson_sample(rng, n, rate)
        total, summed = torch.zeros_like(model.theta), 0.0
        if len(rows):
            total, summed = step.summed(*_examples(data, rows, rng))
        noise = torch.from_numpy(rng.standard_normal(len(total), dtype=np.float32))
        total = total.detach().add_(noise.to(total.device), alpha=mechanism.noise * mechanism.clip)
        optimizer.step(total / (rate * n))
        losses, seen = losses + summed, seen + len(rows)
    return Trained(n, losses / max(seen, 1), time.monotonic() - started)


def poisson_sample(rng: np.random.Generator, count: int, rate: float) -> Tensor:
    """Draw rows of `count`, each with probability `rate`, on its own; there may be none."""
    return torch.from_numpy(np.flatnonzero(rng.random(count) < rate))


def _examples(data: ClientData, rows: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return train examples as a batch: images (B, C, H, W), normalised and augmented; labels."""
    rows = rows.to(data.train_labels.device)
    images = data.train_images[rows]
    if data.augmentation:
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        moves = draw_moves(data.augmentation, len(rows), images.shape[-1], generator)
        images = moved(images, moves.to(images.device))
    return data.normalise(images), data.train_labels[rows]
