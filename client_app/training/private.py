"""Differentially private local training: DP-SGD (Abadi et al. 2016), per example.

A step samples every example with probability q = batch-size / n (Poisson), clips each one's
gradient to norm C, adds Gaussian noise of standard deviation z C to every entry of the sum, and
divides by the expected batch q n. An epoch is ceil(1 / q) steps.

Shapes: B examples of a step or a part of one, P parameters.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from client_app.data.augment import draw_moves, moved
from client_app.data.examples import ClientData
from client_app.models.instances import FlatModel, GeneratorDropout
from client_app.training.loop import (
    Loss,
    Trained,
    label_loss,
    logits_of,
    make_optimizer,
    mixed_precision,
)
from common.config import TrainingSection
from common.errors import ModelError


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

        Images are (B, ...), labels (B,). Raises ModelError where the model remembers an example.
        """
        total, losses = torch.zeros_like(self.model.theta, dtype=torch.float64), 0.0
        for row in range(len(labels)):
            # a copy: where it lay in the batch must not show, not even by its alignment
            image = images[row : row + 1].clone(memory_format=torch.contiguous_format)
            gradient, value = self.of_one(image, labels[row : row + 1])
            total += clipped(gradient[None], self.clip)[0].double()
            losses += value
        return total.float(), losses

    def of_one(self, image: Tensor, label: Tensor) -> tuple[Tensor, float]:
        """Return the gradient (P,) of one example, image (1, ...), label (1,), and its loss.

        Nobody else is there: kernels round differently for few rows and for many, and by the row,
        and weights can be made that turn the last bit into all of a gradient.
        """
        module = self.model.module.train()
        for layer in module.modules():
            if isinstance(layer, GeneratorDropout):
                layer.generator.seed()  # the server knows the run's seed
        kept = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}
        with mixed_precision(self.section, image.device):
            logits = logits_of(module, image, self.num_classes).float()
        value = label_loss(logits, label, self.section)
        self.model.backward(self.loss(image, logits, label, value) if self.loss else value)
        for name, buffer in module.named_buffers():
            if kept.get(name, (None, 0))[0] is not buffer or kept[name][1] != buffer._version:
                raise ModelError(
                    f"{type(module).__name__} changes {name} in its forward pass: what it "
                    "remembers of one example would be in another's gradient, and dp-noise can "
                    "bound neither. Use a layer without running statistics, or set dp-noise = 0."
                )
        return self.model.gradient, float(value.detach())


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
    elif data.augment:  # one by one: no example decides how another is changed
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        images = torch.cat([data.augment(image[None], generator) for image in images] or [images])
    return data.normalise(images), data.train_labels[rows]
