"""The clients of FD (arXiv 1811.11479) and FML (arXiv 2006.16765): knowledge as distributions.

Shapes: B batch, C classes.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.methods.base import OWN, THETA, Trainer, as_array
from client_app.methods.features import class_means
from client_app.training.loop import (
    Loss,
    MomentumSGD,
    Trained,
    cross_entropy,
    logits_of,
    mixed_precision,
)
from client_app.workshop import ModelKind, Tool, borrow, draw_theta
from common.class_means import ClassMeans
from common.parcels import COUNTS, Arrays, Order
from common.seeding import stream_seed
from common.wire import Registration

AUXILIARY = "auxiliary_model"
DISTILL_WEIGHT = 1.0
"""FD: of the divergence from the classes' mean logits."""
LABEL_WEIGHTS = (0.5, 0.5)
"""FML: of the labels, for the own and for the auxiliary model; the rest is the teacher's."""


class FD(Trainer):
    """Distils from the federation's mean logits of the example's own class."""

    def declare(self) -> Registration:
        """Add the number of classes."""
        return replace(super().declare(), num_classes=self.data.num_classes)

    def fit(self, order: Order, tool: Tool) -> Trained:
        """Train with the distillation term, once there are mean logits."""
        if COUNTS not in order.parcel:
            return self.train(order, tool, cross_entropy)
        classes = self.data.num_classes
        received = ClassMeans.read(order.parcel, classes, classes)
        device = self.participant.device
        logits_CC = torch.from_numpy(received.means).to(device)
        present_C = torch.from_numpy(received.counts > 0).to(device)
        return self.train(order, tool, fd_loss(logits_CC, present_C, DISTILL_WEIGHT))

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Send the mean logits of every class, after training."""
        return class_means(tool.model.module, self.data, None).arrays()


def fd_loss(logits_CC: Tensor, present_C: Tensor, weight: float) -> Loss:
    """Make the loss: cross-entropy + weight KL(softmax(mean logits of the class) || student).

    Examples of classes without mean logits add nothing.
    """
    targets_CC = functional.log_softmax(logits_CC, dim=1)

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        student_BC = functional.log_softmax(logits, dim=1)
        divergence_BC = functional.kl_div(
            student_BC, targets_CC[labels], reduction="none", log_target=True
        )
        divergence = (divergence_BC * present_C[labels, None]).sum() / len(labels)
        return cross_entropy(images, logits, labels) + weight * divergence

    return loss


class FML(Trainer):
    """Trains its own model and the shared auxiliary one together; each is the other's teacher."""

    def declare(self) -> Registration:
        """Add the size of the auxiliary model."""
        size = borrow(self._auxiliary_kind).model.num_parameters
        return replace(super().declare(), num_global_parameters=size)

    def fit(self, order: Order, tool: Tool) -> Trained:
        """Take both models over the same batches."""
        auxiliary = self._auxiliary(order)
        trained = self._train_both(order, tool, auxiliary)
        self.keep(order, auxiliary, AUXILIARY, theta=False)
        return trained

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Send the trained auxiliary model."""
        return {THETA: as_array(borrow(self._auxiliary_kind).model.theta)}

    def first_theta(self, tool: Tool, name: str) -> Tensor:
        """Draw the auxiliary model's first weights from its own stream."""
        if name == OWN:
            return super().first_theta(tool, name)
        seed = stream_seed(self.participant.config.run.seed, "first-auxiliary")
        return draw_theta(self._auxiliary_kind, seed)

    def _auxiliary(self, order: Order) -> Tool:
        """Load the auxiliary model: as received, or as drawn before the first mean."""
        tool = borrow(self._auxiliary_kind)
        self.load(tool, AUXILIARY, order, before=order.header.server_round)
        if THETA in order.parcel:
            tool.model.load(self.vector(order, THETA, tool.model.num_parameters))
        return tool

    @property
    def _auxiliary_kind(self) -> ModelKind:
        name = self.participant.config.distill.global_model
        return replace(self.kind, name=name, role="global")

    def _train_both(self, order: Order, tool: Tool, auxiliary: Tool) -> Trained:
        started, section = time.monotonic(), self.training(order)
        models = (tool.model, auxiliary.model)
        weights = LABEL_WEIGHTS
        optimizers = [MomentumSGD(model.theta, section) for model in models]
        for model in models:
            model.module.train()
        generator = self.shuffler("shuffle", order)
        total, seen = torch.zeros((), device=tool.model.theta.device), 0
        for _ in range(section.local_epochs):
            for images, labels in self.data.batches(section.batch_size, generator):
                with mixed_precision(section, images.device):
                    both = [
                        logits_of(m.module, images, self.data.num_classes).float() for m in models
                    ]
                for i, model in enumerate(models):
                    value = mutual_loss(both[i], both[1 - i], labels, weights[i])
                    model.backward(value)
                    nn.utils.clip_grad_norm_([model.theta], section.client_clip_norm)
                    if i == 0:
                        total += value.detach() * len(labels)
                for optimizer in optimizers:
                    optimizer.step()
                seen += len(labels)
        return Trained(self.data.num_train, float(total) / seen, time.monotonic() - started)


def mutual_loss(student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor, weight: float) -> Tensor:
    """Return weight CE + (1 - weight) KL(teacher || student), batchmean.

    The teacher is detached: it learns from a loss of its own.
    """
    divergence = functional.kl_div(
        functional.log_softmax(student_BC, dim=1),
        functional.log_softmax(teacher_BC.detach(), dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return weight * functional.cross_entropy(student_BC, labels_B) + (1 - weight) * divergence
