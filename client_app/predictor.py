"""What a client predicts with: its own model, its common model, or a mixture of the two.

The mixture is of probabilities, w own + (1 - w) common, and w is chosen on the client's validation
examples, which neither model was trained on and no test counts (docs/method.md, "The predictor").

Shapes: B examples, C classes.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.examples import ClientData
from client_app.training.loop import FlatModel, judged, logits_over, num_correct
from common.messages import Evaluation

STEPS = 20
"""Weights that are tried: 0, 1/20, ..., 1."""
PER_POINT = 4.0
"""Weight of a teacher for each unit of accuracy by which it leads: all of it from 25 points on."""
UNSURE = 0.0
"""The weight of the own model where there is no validation example."""


def choose_weight(own_BC: Tensor, common_BC: Tensor, labels_B: Tensor) -> float:
    """Return the weight of the own model that makes the labels most likely; logits come in.

    Of the weights 0, 1/20, ..., 1 the one with the least cross-entropy, the smaller of two equals:
    counting correct answers would be noise with some tens of examples.
    """
    if not len(labels_B):
        return UNSURE
    weights_W = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device=own_BC.device)
    picked = labels_B[:, None]
    own_B1 = functional.softmax(own_BC.double(), dim=1).gather(1, picked)
    common_B1 = functional.softmax(common_BC.double(), dim=1).gather(1, picked)
    mixed_BW = common_B1 + weights_W * (own_B1 - common_B1)
    return float(weights_W[mixed_BW.clamp_min(1e-30).log().mean(0).argmax()])


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


def mixture(own_BC: Tensor, common_BC: Tensor, weight: float) -> Tensor:
    """Return the log-probabilities (B, C) of the mixture of two models' logits."""
    own = functional.softmax(own_BC, dim=1)
    common = functional.softmax(common_BC, dim=1)
    return torch.lerp(common, own, weight).clamp_min(1e-30).log()


def evaluate_both(own: FlatModel, common: FlatModel, data: ClientData) -> Evaluation:
    """Test both models as they are, and the mixture that the validation examples prefer."""
    started, models = time.monotonic(), (own, common)
    own_BC, common_BC = (logits_over(model, data, validation=True) for model in models)
    weight = choose_weight(own_BC, common_BC, data.validation_labels)
    own_BC, common_BC = (logits_over(model, data) for model in models)
    correct = {
        name: num_correct(logits, data.test_labels)
        for name, logits in (("own", own_BC), ("common", common_BC))
    }
    return replace(judged(mixture(own_BC, common_BC, weight), data, started), others=correct)
