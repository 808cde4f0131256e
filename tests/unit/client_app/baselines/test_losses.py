"""What baselines train with and predict by, against slow, clear references."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from client_app.methods.features import Tap
from client_app.methods.fedavg import mutual_loss
from client_app.methods.prototypes import fd_loss, nearest_class, prototype_loss
from client_app.training.loop import label_loss
from common.config import BaselineSection, TrainingSection

pytestmark = pytest.mark.numeric

IMAGES = torch.zeros(3, 1)  # no loss looks at them
LABELS = torch.tensor([2, 0, 1])


def draw(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape)).float()


def softmax(row: Tensor) -> list[float]:
    powers = [math.exp(x) for x in row.tolist()]
    return [p / sum(powers) for p in powers]


def slow_cross_entropy(logits: Tensor) -> float:
    rows = [-math.log(softmax(x)[y]) for x, y in zip(logits, LABELS.tolist(), strict=True)]
    return sum(rows) / len(rows)


def hard(logits: Tensor) -> Tensor:
    return label_loss(logits, LABELS, TrainingSection())


def slow_kl(teacher: Tensor, student: Tensor) -> float:
    """Mean over the batch of sum_c p log(p / q)."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        total += sum(p * math.log(p / q) for p, q in zip(softmax(t), softmax(s), strict=True))
    return total / len(teacher)


def tapping(features: Tensor) -> Tap:
    tap = Tap()
    tap.features = features
    return tap


def test_prototype_loss() -> None:
    settings = BaselineSection(prototype_weight=7.0)
    features, prototypes, logits = draw(3, 5), draw(4, 5), draw(3, 4)
    present = torch.tensor([True, False, True, True])  # class 1 has no prototype yet
    loss = prototype_loss(tapping(features), prototypes, present, settings)
    gaps = []
    for x, y in zip(features, LABELS, strict=True):
        gaps.append(float((x - prototypes[y]).square().sum()) / 5 if present[y] else 0.0)
    expected = slow_cross_entropy(logits) + 7.0 * sum(gaps) / 3
    assert float(loss(IMAGES, logits, LABELS, hard(logits))) == pytest.approx(expected, rel=1e-5)


def test_prototype_loss_has_a_finite_gradient_at_the_prototype() -> None:
    settings = BaselineSection()
    features = draw(4, 5)[LABELS].requires_grad_()
    loss = prototype_loss(tapping(features), draw(4, 5), torch.ones(4, dtype=torch.bool), settings)
    loss(IMAGES, draw(3, 4), LABELS, torch.zeros(())).backward()
    assert torch.isfinite(features.grad).all()


def test_nearest_class_is_the_nearest_that_has_a_prototype() -> None:
    prototypes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    features = torch.tensor([[0.9, 0.1], [4.0, 4.0]])
    everybody, without = torch.tensor([True] * 3), torch.tensor([True, False, True])
    assert nearest_class(features, prototypes, everybody).tolist() == [1, 2]
    assert nearest_class(features, prototypes, without).tolist() == [0, 2]


def test_fd_target_is_a_distribution_not_logits() -> None:
    mean_logits, logits = 5 * draw(4, 4), draw(3, 4)
    present = torch.tensor([True, True, False, True])
    found = float(fd_loss(mean_logits, present, 2.0)(IMAGES, logits, LABELS, hard(logits)))
    known = [i for i, y in enumerate(LABELS.tolist()) if present[y]]
    divergence = slow_kl(mean_logits[LABELS[known]], logits[known]) * len(known) / 3
    assert found == pytest.approx(slow_cross_entropy(logits) + 2 * divergence, rel=1e-4)
    same = fd_loss(logits[[1, 2, 0]], torch.ones(3, dtype=torch.bool), 1.0)
    assert float(same(IMAGES, logits, LABELS, hard(logits))) == pytest.approx(
        slow_cross_entropy(logits), rel=1e-5
    )


def test_mutual_loss_is_batchmean_and_its_teacher_is_detached() -> None:
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 5)[:, :4].clone().requires_grad_()
    loss = mutual_loss(student, teacher, hard(student), 0.25)
    expected = 0.25 * slow_cross_entropy(student.detach()) + 0.75 * slow_kl(
        teacher.detach(), student.detach()
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert isinstance(student.grad, Tensor)
