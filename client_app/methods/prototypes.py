"""The clients of FedProto (arXiv 2105.00243), FedTGP (arXiv 2401.03230) and FD (arXiv 1811.11479).

Shapes: B batch, C classes, D feature.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from client_app.methods.base import Method
from client_app.methods.features import Tap, class_means, tapped
from client_app.models.instances import Instance
from client_app.training.loop import TEST_BATCH, Loss, Trained, logits_of
from common.class_means import ClassMeans
from common.config import BaselineSection
from common.messages import Evaluation
from common.records import COUNTS, Arrays, Received

DISTILL_WEIGHT = 1.0
"""FD: of the divergence from the classes' mean logits."""

Known = tuple[Tensor, Tensor]
"""Prototypes (C, D), and which classes have one (C,)."""


class FedProto(Method):
    """Draws its features towards the global prototypes; predicts by the nearest one."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train with the prototypes' term, once there are any."""
        known = self._prototypes(task, instance)
        if known is None:
            return self.train(task, instance)
        with tapped(self.head(instance)) as tap:
            return self.train(task, instance, prototype_loss(tap, *known, self.settings))

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the mean feature of every class, after training."""
        return class_means(instance.model.module, self.data, self.head(instance)).arrays()

    @torch.no_grad()
    def measure(self, task: Received, instance: Instance) -> Evaluation:
        """Test the nearest prototype and, beside it, the head; the loss is the head's.

        Before there are prototypes the head alone predicts.
        """
        started, size = time.monotonic(), TEST_BATCH.get(self.participant.device.type, 256)
        data, known = self.data, self._prototypes(task, instance)
        nearest, by_head, loss = self._said(data.test_batches(size), known, instance)
        return Evaluation(
            num_test=data.num_test,
            num_correct=nearest,
            test_loss=loss / data.num_test,
            seconds=time.monotonic() - started,
            others={"head": by_head},
            num_validation=len(data.validation_labels),
            num_validated=self._said(data.validation_batches(size), known, instance)[0],
        )

    def _said(
        self, batches: Iterable[tuple[Tensor, Tensor]], known: Known | None, instance: Instance
    ) -> tuple[int, int, float]:
        """Count what the nearest prototype and the head get right; sum up the head's loss."""
        device = self.participant.device
        instance.model.module.eval()
        nearest = by_head = torch.zeros((), dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        with tapped(self.head(instance)) as tap:
            for images, labels in batches:
                logits = logits_of(instance.model.module, images, self.data.num_classes)
                chosen = logits.argmax(dim=1)
                by_head = by_head + (chosen == labels).sum()
                if known is not None:
                    chosen = nearest_class(tap.features, *known)
                nearest = nearest + (chosen == labels).sum()
                loss += functional.cross_entropy(logits, labels, reduction="sum").double()
        return int(nearest), int(by_head), float(loss)

    def _prototypes(self, task: Received, instance: Instance) -> Known | None:
        """Return the received prototypes (C, D) and which classes have one (C,), or None."""
        if COUNTS not in task:
            return None
        dim = self.head(instance).layer.in_features
        received = ClassMeans.read(task, self.data.num_classes, dim)
        device = self.participant.device
        present = torch.from_numpy(received.counts > 0).to(device)
        return torch.from_numpy(received.means).to(device), present


class FedTGP(FedProto):
    """FedTGP differs on the server alone."""


class FD(Method):
    """Distils from the federation's mean logits of the example's own class."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train with the distillation term, once there are mean logits."""
        if COUNTS not in task:
            return self.train(task, instance)
        classes = self.data.num_classes
        received = ClassMeans.read(task, classes, classes)
        device = self.participant.device
        logits_CC = torch.from_numpy(received.means).to(device)
        present_C = torch.from_numpy(received.counts > 0).to(device)
        return self.train(task, instance, fd_loss(logits_CC, present_C, DISTILL_WEIGHT))

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the mean logits of every class, after training."""
        return class_means(instance.model.module, self.data, None).arrays()


def fd_loss(logits_CC: Tensor, present_C: Tensor, weight: float) -> Loss:
    """Make the loss: the labels' + weight KL(softmax(mean logits of the class) || student).

    Examples of classes without mean logits add nothing.
    """
    targets_CC = functional.log_softmax(logits_CC, dim=1)

    def loss(images: Tensor, logits: Tensor, labels: Tensor, hard: Tensor) -> Tensor:
        student_BC = functional.log_softmax(logits, dim=1)
        divergence_BC = functional.kl_div(
            student_BC, targets_CC[labels], reduction="none", log_target=True
        )
        divergence = (divergence_BC * present_C[labels, None]).sum() / len(labels)
        return hard + weight * divergence

    return loss


def prototype_loss(
    tap: Tap, prototypes_CD: Tensor, present_C: Tensor, settings: BaselineSection
) -> Loss:
    """Make the loss: the labels' + weight times the distance of features to their prototypes.

    The distance is the mean over batch and entries of the squared difference. Examples of classes
    without a prototype add nothing. Differs from paper: there it is the Euclidean distance.
    """

    def loss(images: Tensor, logits: Tensor, labels: Tensor, hard: Tensor) -> Tensor:
        gaps_BD = (tap.features - prototypes_CD[labels]) * present_C[labels, None]
        distance = gaps_BD.square().mean()
        return hard + settings.prototype_weight * distance

    return loss


def nearest_class(features_BD: Tensor, prototypes_CD: Tensor, present_C: Tensor) -> Tensor:
    """Return the class (B,) whose prototype is nearest, among those that have one."""
    distances_BC = torch.cdist(features_BD, prototypes_CD)
    return distances_BC.masked_fill(~present_C, torch.inf).argmin(dim=1)
