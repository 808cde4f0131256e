"""Local training and testing: plain torch on flat parameters.

Shapes: B batch, C classes, P trainable scalars of a client's model (the paper's K_i). theta has the
layout of `model.named_parameters()`: each tensor flattened row-major, one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.examples import ClientData
from client_app.data.losses import OwnLoss, explained
from client_app.models.building import watching_draws
from client_app.models.instances import FlatModel
from client_app.training.allocator import warn_of_slow_bfloat16
from client_app.training.optim import AdamW
from client_app.training.recording import Step
from common.config import TrainingSection
from common.errors import ModelError
from common.messages import Evaluation

TEST_BATCH = {"cpu": 64, "cuda": 1024}
"""By device type: 64 stay in a CPU's cache (1.3 times as fast as 256), a GPU wants few launches."""

Reduction = Literal["mean", "none"]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(images (B, ...), logits (B, C), labels (B,), the scalar `label_loss`) -> scalar loss."""


def delta(theta_sent: Tensor, theta_trained: Tensor) -> Tensor:
    """Return theta_sent - theta_trained (P,): before minus after, a pseudo-gradient.

    The hypernetwork DESCENDS along it. This is the only place that knows the sign.
    """
    return theta_sent - theta_trained


@dataclass(frozen=True)
class Trained:
    """What local training measured: mean loss per example over all epochs, seconds."""

    num_examples: int
    loss: float
    seconds: float


class Examples(Protocol):
    """A client's data to train on, or a part of them."""

    @property
    def num_train(self) -> int:
        """Number of examples."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def loss(self) -> OwnLoss | None:
        """What is descended in place of the loss of the labels' kind."""

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what one epoch trains on, as `ClientData.batches`."""


def label_loss(
    logits: Tensor,
    labels: Tensor,
    section: TrainingSection,
    own: OwnLoss | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return `loss_of` with labels smoothed by `label-smoothing`, or one's own, as it is."""
    if own is None:
        return loss_of(logits, labels, smoothing=section.label_smoothing, reduction=reduction)
    return own(logits, labels).mean() if reduction == "mean" else own(logits, labels)


def loss_of(
    logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Return the loss of outputs (B, C) by the labels' kind, its mean or each example's (B,).

    Of classes, int64 (B,), the cross-entropy; of several labels, bool (B, C), the binary one, both
    in nats; of numbers, float32 (B, C), the squared error. The last two are means over C.
    """
    if labels.dtype == torch.int64:
        return functional.cross_entropy(
            logits, labels, reduction=reduction, label_smoothing=smoothing
        )
    if labels.is_floating_point():
        losses = (logits - labels).square().mean(1)
    else:
        wanted = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        found = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        losses = found.mean(1)
    return losses.mean() if reduction == "mean" else losses


def distilled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    hard: Tensor,
    *,
    alpha: float | Tensor,
    temperature: float,
) -> Tensor:
    """Return the loss of every example (..., B) from both models' logits (..., B, C).

    alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) hard, as in paper
    section 3.3 (method.md, Phase 2); of several labels each one's KL, of numbers the squared
    difference, the means over C. `hard` is the `label_loss`, (..., B) or its mean; `alpha` is one
    number, or every client's own (G, 1).
    """
    found, target = student / temperature, teacher.float() / temperature
    if labels.dtype == torch.int64:
        target = functional.log_softmax(target, dim=-1)
        found = functional.log_softmax(found, dim=-1)
        divergence = functional.kl_div(found, target, reduction="none", log_target=True).sum(dim=-1)
    elif labels.is_floating_point():
        divergence = (found - target).square().mean(dim=-1)
    else:
        yes, no = functional.logsigmoid(target), functional.logsigmoid(-target)
        terms = yes.exp() * (yes - functional.logsigmoid(found))
        terms = terms + no.exp() * (no - functional.logsigmoid(-found))
        divergence = terms.mean(dim=-1)
    return alpha * temperature**2 * divergence + (1 - alpha) * hard


@dataclass(frozen=True)
class Teacher:
    """A common model as it was sent, and its weight: frozen, in evaluation mode, no graph."""

    module: nn.Module
    alpha: float | Tensor = field(compare=False)
    temperature: float

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor, hard: Tensor) -> Tensor:
        """Return the mean loss of a batch; as `Loss`."""
        self.module.eval()
        with torch.no_grad():
            teacher = self.module(images)
        given = (logits, teacher, labels, hard)
        return distilled(*given, alpha=self.alpha, temperature=self.temperature).mean()


def mixed_precision(section: TrainingSection, device: torch.device) -> torch.autocast:
    """Compute forward passes in `training-precision`; backward passes follow them."""
    enabled = section.training_precision == "bfloat16"
    if enabled:
        warn_of_slow_bfloat16(device.type)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


class MomentumSGD:
    """Descends theta (..., P) in place as torch.optim.SGD would; as `AdamW`, with a momentum."""

    def __init__(self, theta: Tensor, section: TrainingSection) -> None:
        self._theta, self._section = theta.detach(), section
        self.rate: float | Tensor = section.learning_rate
        self._momentum = torch.zeros_like(self._theta)
        self.state = (self._momentum,)

    @torch.no_grad()
    def step(self, gradient: Tensor, of: slice | EllipsisType = ...) -> None:
        """Descend along a gradient (..., P) with the models `of` a stack, or with all."""
        theta, momentum, section = self._theta[of], self._momentum[of], self._section
        momentum.mul_(section.momentum).add_(gradient).add_(theta, alpha=section.weight_decay)
        if isinstance(self.rate, float):
            theta.sub_(momentum, alpha=self.rate)
        else:
            theta.sub_(momentum * self.rate)


def make_optimizer(theta: Tensor, section: TrainingSection) -> MomentumSGD | AdamW:
    """Make what descends theta (..., P) by `optimizer`, its state afresh."""
    return (AdamW if section.optimizer == "adamw" else MomentumSGD)(theta, section)


def train(
    model: FlatModel,
    data: Examples,
    section: TrainingSection,
    *,
    generator: torch.Generator,
    loss: Loss | None = None,
    clip: bool = True,
) -> Trained:
    """Train in place: a fresh optimizer, shuffled batches, last batch kept.

    The model's theta (P,) is updated, its BatchNorm buffers too. `loss` is descended; None: the
    `label_loss`. `clip`: whether the gradient's norm is clipped at `client-clip-norm`.
    """
    started = time.monotonic()
    optimizer, classes, own = make_optimizer(model.theta, section), data.num_classes, data.loss
    sums = torch.zeros(2, device=model.theta.device)  # of losses, of examples

    def step(images: Tensor, labels: Tensor) -> None:
        with mixed_precision(section, images.device):
            logits = logits_of(model.module, images, classes).float()
            value = label_loss(logits, labels, section, own)
            value = loss(images, logits, labels, value) if loss else value
        model.backward(value)
        if clip:
            nn.utils.clip_grad_norm_([model.theta], section.client_clip_norm)
        optimizer.step(model.gradient)
        sums.add_(torch.stack([value.detach(), torch.ones_like(value)]), alpha=len(labels))

    take: Step = step
    if model.recorder and (loss is None or isinstance(loss, Teacher)):
        varying = torch.tensor([section.learning_rate, loss.alpha if loss else 0.0]).to(sums.device)
        optimizer.rate, loss = varying[0], replace(loss, alpha=varying[1]) if loss else None
        recipe = (section.model_copy(update={"learning_rate": 0.0}), classes, id(own), loss, clip)
        settings = (sums, varying, *optimizer.state)
        take, (sums, *_) = model.recorder.begin(recipe, step, settings)
    model.module.train()
    with nullcontext() if model.has_trained else watching_draws(model.module, sums.device):
        for _ in range(section.local_epochs):
            for images, labels in data.batches(section.batch_size, generator):
                take(images, labels)
    model.has_trained = True
    model.require_views()
    return Trained(data.num_train, float(sums[0] / sums[1]), time.monotonic() - started)


@torch.no_grad()
def logits_over(model: FlatModel, data: ClientData, *, validation: bool = False) -> Tensor:
    """Return the logits (B, C) of the test or validation examples, in evaluation mode."""
    model.module.eval()
    size = TEST_BATCH.get(model.theta.device.type, 256)
    batches = data.validation_batches(size) if validation else data.test_batches(size)
    found = [logits_of(model.module, images, data.num_classes) for images, _ in batches]
    model.require_views()
    return torch.cat(found) if found else model.theta.new_empty(0, data.num_classes)


def evaluate(model: FlatModel, data: ClientData) -> Evaluation:
    """Count correct test and validation examples of the model as it is, in evaluation mode."""
    started = time.monotonic()
    logits, validation = (logits_over(model, data, validation=part) for part in (False, True))
    return judged(logits, validation, data, started)


def judged(logits: Tensor, validation: Tensor, data: ClientData, started: float) -> Evaluation:
    """Count correct test and validation examples by their logits (B, C); begun at `started`."""
    return Evaluation(
        num_test=data.num_test,
        num_correct=num_correct(logits, data.test_labels),
        test_loss=float(loss_of(logits.double(), data.test_labels)),
        seconds=time.monotonic() - started,
        num_validation=len(data.validation_labels),
        num_validated=num_correct(validation, data.validation_labels),
    )


def num_correct(logits: Tensor, labels: Tensor) -> float:
    """Count the examples that outputs (B, C) get right.

    Of classes (B,), those whose largest output is that of their label; of several labels (B, C), of
    each example the share of its labels that is right; of numbers (B, C), B max(0, R^2).
    """
    if labels.dtype == torch.int64:
        return int((logits.argmax(dim=1) == labels).sum())
    if not len(labels):
        return 0.0
    if labels.is_floating_point():
        return len(labels) * max(0.0, explained(logits, labels))
    return float(((logits > 0) == labels).double().mean(1).sum())


def logits_of(module: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    """Classify images (B, ...); raise ModelError unless the logits are (B, num_classes)."""
    logits: Tensor = module(images)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(module).__name__} returns a {type(logits).__name__}; expected one tensor of "
            f"logits ({len(images)}, {num_classes}). Return that one alone: output[0], "
            "output.logits, or as it is called there."
        )
    if logits.shape != (len(images), num_classes):
        raise ModelError(
            f"{type(module).__name__} maps images {tuple(images.shape)} to {tuple(logits.shape)}; "
            f"expected logits ({len(images)}, {num_classes}). Build it for {num_classes} classes."
        )
    return logits
