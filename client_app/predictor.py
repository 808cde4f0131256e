"""What a client predicts with: its own model, its common model, or a mixture of the two.

The mixture is of probabilities, or of numbers, w own + (1 - w) common, and w is chosen on the
client's validation examples, which neither model was trained on and no test counts (docs/method.md,
"One MH-pFedHN-PG round").

Shapes: B examples, C classes.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.examples import ClientData
from client_app.data.source import LABELS, NUMBERS
from client_app.models.instances import FlatModel
from client_app.training.loop import judged, logits_over, num_correct
from common.messages import Evaluation

STEPS = 20
"""Weights that are tried: 0, 1/20, ..., 1."""
PER_POINT = 4.0
"""Weight of a teacher for each unit of accuracy by which it leads: all of it from 25 points on."""
UNSURE = 0.0
"""The weight of the own model where there is no validation example."""
LEAST = 1e-30
"""Of a probability: that its logarithm is a number."""


def choose_weight(own_BC: Tensor, common_BC: Tensor, labels: Tensor) -> float:
    """Return the weight of the own model that says the labels best; outputs come in.

    Of the weights 0, 1/20, ..., 1 the one with the least loss (of classes the cross-entropy), the
    smaller of two equals: counting correct answers would be noise with some tens of examples. Where
    it is not better than the better of the two models by more than a standard error, that model
    predicts alone.
    """
    if not len(labels):
        return UNSURE
    weights_W = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device=own_BC.device)
    likely_BW = _likely(own_BC.double(), common_BC.double(), labels, weights_W)
    own, common, best = STEPS, 0, int(likely_BW.mean(0).argmax())
    single = own if likely_BW[:, own].mean() > likely_BW[:, common].mean() else common
    lead_B = likely_BW[:, best] - likely_BW[:, single]
    sure = lead_B.mean() > lead_B.std(correction=0) / len(lead_B) ** 0.5
    return float(weights_W[best if sure else single])


def _likely(own_BC: Tensor, common_BC: Tensor, labels: Tensor, weights_W: Tensor) -> Tensor:
    """Return how well each mixture says every example's labels (B, W): minus its loss."""
    if labels.dtype == torch.int64:
        picked = labels[:, None]
        own_B1 = functional.softmax(own_BC, dim=1).gather(1, picked)
        common_B1 = functional.softmax(common_BC, dim=1).gather(1, picked)
        return (common_B1 + weights_W * (own_B1 - common_B1)).clamp_min(LEAST).log()
    own_BC1, common_BC1, said_BC1 = own_BC[..., None], common_BC[..., None], labels[..., None]
    if labels.is_floating_point():
        mixed_BCW = common_BC1 + weights_W * (own_BC1 - common_BC1)
        return -(mixed_BCW - said_BC1).square().mean(1)
    yes_BCW = torch.lerp(common_BC1.sigmoid(), own_BC1.sigmoid(), weights_W)
    return torch.where(said_BC1, yes_BCW, 1 - yes_BCW).clamp_min(LEAST).log().mean(1)


def teaching_weight(
    student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor, *, most: float
) -> float:
    """Return the weight of a teacher in the loss, 0 to `most`, from both models' logits.

    PER_POINT times what the teacher gets right more often than the student, of the validation
    examples: a teacher that is no better teaches nothing, and so it cannot hurt.
    """
    if not len(labels_B):
        return 0.0
    lead = num_correct(teacher_BC, labels_B) - num_correct(student_BC, labels_B)
    return min(most, max(0.0, PER_POINT * lead / len(labels_B)))


def mixture(own_BC: Tensor, common_BC: Tensor, weight: float | Tensor, target: str) -> Tensor:
    """Return the outputs (B, C) of two models mixed: log-probabilities, logits, or numbers."""
    if target == NUMBERS:
        return torch.lerp(common_BC, own_BC, weight)
    if target == LABELS:
        return torch.lerp(common_BC.sigmoid(), own_BC.sigmoid(), weight).logit(eps=1e-7)
    own, common = functional.softmax(own_BC, dim=1), functional.softmax(common_BC, dim=1)
    return torch.lerp(common, own, weight).clamp_min(LEAST).log()


class Predictor(nn.Module):
    """Both models as one: examples (B, ...) in, the outputs (B, C) of the mixture out.

    Of classes they are log-probabilities.
    """

    weight: Tensor

    def __init__(self, own: nn.Module, common: nn.Module, weight: float, target: str) -> None:
        super().__init__()
        self.own, self.common, self.target = own, common, target
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        """Predict by both."""
        return mixture(self.own(images), self.common(images), self.weight, self.target)


def choose_predictor(own: FlatModel, common: FlatModel, data: ClientData) -> Predictor:
    """Return both models, mixed as the validation examples prefer."""
    own_BC, common_BC = (logits_over(model, data, validation=True) for model in (own, common))
    weight = choose_weight(own_BC, common_BC, data.validation_labels)
    predictor = Predictor(own.module, common.module, weight, data.target)
    return predictor.to(own.theta.device)


class Logits(NamedTuple):
    """What a model says of the client's test and validation examples, (B, C) each."""

    test: Tensor
    validation: Tensor


def evaluate_both(own: FlatModel, common: FlatModel, data: ClientData) -> Evaluation:
    """Test both models as they are, and the mixture that the validation examples prefer."""
    started = time.monotonic()
    said = [
        Logits(*(logits_over(model, data, validation=part) for part in (False, True)))
        for model in (own, common)
    ]
    return judge_both(said, data, started)


def judge_both(said: Iterable[Logits], data: ClientData, started: float) -> Evaluation:
    """Test them by what own and common model said; `started` is when that was begun."""
    own, common = said
    weight = choose_weight(own.validation, common.validation, data.validation_labels)
    correct = {
        name: num_correct(logits.test, data.test_labels)
        for name, logits in (("own", own), ("common", common))
    }
    mixed = Logits(*(mixture(o, c, weight, data.target) for o, c in zip(own, common, strict=True)))
    return replace(judged(*mixed, data, started), others=correct)
