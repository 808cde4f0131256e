"""Learning from a teacher beside the labels (paper section 3.3; method.md, Phase 2).

alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) cross-entropy. The teacher
is w_g as it was sent: frozen, in evaluation mode, no graph is built for it.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config import DistillSection


@dataclass(frozen=True)
class Teacher:
    """A model that teaches, and how much."""

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
