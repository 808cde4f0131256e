"""Local training and testing: plain torch on flat parameters.

Shapes: B batch, C classes, P parameters of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.examples import ClientData
from common.config import DistillSection, TrainingSection
from common.errors import ModelError
from common.log import logger
from common.messages import Evaluation
from common.parameters import FlatModel

TEST_BATCH = {"cpu": 64, "cuda": 1024}
"""By device type: on a CPU the activations of 64 pictures stay in the cache (1.3 times as fast as
256, measured), a GPU wants few launches."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (B, ...), logits (B, C), labels (B,)) -> scalar loss."""


@dataclass(frozen=True)
class Trained:
    """What local training measured: mean loss per example over all epochs, seconds."""

    num_examples: int
    loss: float
    seconds: float


class Examples(Protocol):
    """What is trained on: a client's data, or a part of them."""

    @property
    def num_train(self) -> int:
        """Number of examples."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what one epoch trains on, as `ClientData.batches`."""


def cross_entropy(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch, in nats."""
    return functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Teacher:
    """Learning from a model beside the labels (paper section 3.3; method.md, Phase 2).

    alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) cross-entropy. The
    teacher is w_g as it was sent: frozen, in evaluation mode, no graph is built for it.
    """

    module: nn.Module
    section: DistillSection

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch: images (B, ...), logits (B, C), labels (B,)."""
        divergence = self._divergence(images, logits, reduction="batchmean")
        return self._mixed(divergence, functional.cross_entropy(logits, labels))

    def losses(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every example, (B,)."""
        divergence = self._divergence(images, logits, reduction="none").sum(dim=1)
        return self._mixed(divergence, functional.cross_entropy(logits, labels, reduction="none"))

    def _divergence(self, images: Tensor, logits: Tensor, *, reduction: str) -> Tensor:
        self.module.eval()
        temperature = self.section.distill_temperature
        with torch.no_grad():
            target = functional.log_softmax(self.module(images).float() / temperature, dim=1)
        student = functional.log_softmax(logits / temperature, dim=1)
        return functional.kl_div(student, target, reduction=reduction, log_target=True)

    def _mixed(self, divergence: Tensor, hard: Tensor) -> Tensor:
        alpha, temperature = self.section.distill_alpha, self.section.distill_temperature
        return alpha * temperature**2 * divergence + (1 - alpha) * hard


def mixed_precision(section: TrainingSection, device: torch.device) -> torch.autocast:
    """Compute forward passes in `training-precision`; backward passes follow them."""
    enabled = section.training_precision == "bfloat16"
    if enabled:
        warn_of_slow_bfloat16(device.type)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@cache  # once in a process
def warn_of_slow_bfloat16(device_type: str) -> None:
    """Say so where bfloat16 costs time instead of saving it: a CPU without instructions for it.

    There every number is converted back and forth; with AVX2 alone five architectures took more
    than five times as long as in float32.
    """
    if device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "training-precision bfloat16 is several times slower than float32 on this processor: "
            "it has no instructions for it (AVX512-BF16 or AMX). Set training-precision to float32."
        )


@torch.no_grad()
def descend(theta: Tensor, gradient: Tensor, momentum: Tensor, section: TrainingSection) -> None:
    """Take a step of SGD with momentum and weight decay in place, as torch.optim.SGD computes it.

    Written out because torch.optim imports the whole of torch's compiler on first use: two seconds,
    in every process that trains. All three tensors have one shape, that of theta.
    """
    momentum.mul_(section.momentum).add_(gradient).add_(theta, alpha=section.weight_decay)
    theta.sub_(momentum, alpha=section.learning_rate)


class MomentumSGD:
    """Descends along a flat vector's own gradient; its momentum starts at zero."""

    def __init__(self, theta: Tensor, section: TrainingSection) -> None:
        self._theta = theta
        self._section = section
        self._momentum = torch.zeros_like(theta, requires_grad=False)

    def step(self) -> None:
        """Descend along `theta.grad` (P,)."""
        assert self._theta.grad is not None
        descend(self._theta, self._theta.grad, self._momentum, self._section)


def train(
    model: FlatModel,
    data: Examples,
    section: TrainingSection,
    *,
    generator: torch.Generator,
    loss: Loss = cross_entropy,
    clip: bool = True,
) -> Trained:
    """Train in place: SGD with fresh momentum, shuffled batches, last batch kept.

    Parameters
    ----------
    model : its theta (P,) is updated; its BatchNorm buffers move too.
    generator : shuffles the examples.
    clip : whether the gradient's norm is clipped at `client-clip-norm` (w_g is trained without).
    """
    started = time.monotonic()
    optimizer = MomentumSGD(model.theta, section)
    model.module.train()
    total = torch.zeros((), device=model.theta.device)
    seen = 0
    for _ in range(section.local_epochs):
        for images, labels in data.batches(section.batch_size, generator):
            with mixed_precision(section, images.device):
                logits = logits_of(model.module, images, data.num_classes).float()
                value = loss(images, logits, labels)
            model.backward(value)
            if clip:
                nn.utils.clip_grad_norm_([model.theta], section.client_clip_norm)
            optimizer.step()
            total += value.detach() * len(labels)
            seen += len(labels)
    return Trained(data.num_train, float(total) / seen, time.monotonic() - started)


@torch.no_grad()
def evaluate(model: FlatModel, data: ClientData) -> Evaluation:
    """Count correct test examples of the model as it is, in evaluation mode."""
    started = time.monotonic()
    model.module.eval()
    correct = torch.zeros((), dtype=torch.int64, device=model.theta.device)
    total = torch.zeros((), dtype=torch.float64, device=model.theta.device)
    batch_size = TEST_BATCH.get(model.theta.device.type, 256)
    for images, labels in data.test_batches(batch_size):
        logits = logits_of(model.module, images, data.num_classes)
        correct += (logits.argmax(dim=1) == labels).sum()
        total += functional.cross_entropy(logits, labels, reduction="sum").double()
    return Evaluation(
        num_test=data.num_test,
        num_correct=int(correct),
        test_loss=float(total) / data.num_test,
        seconds=time.monotonic() - started,
    )


def logits_of(module: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    """Classify images (B, ...); raise ModelError unless the logits are (B, num_classes)."""
    logits: Tensor = module(images)
    if logits.shape != (len(images), num_classes):
        raise ModelError(
            f"{type(module).__name__} maps images {tuple(images.shape)} to {tuple(logits.shape)}; "
            f"expected logits ({len(images)}, {num_classes}). Build it for {num_classes} classes."
        )
    return logits
