"""The weight of the own model in the predictor, and of the teacher in the loss."""

import math

import torch

from client_app.predictor import choose_weight, mixture, teaching_weight

LABELS = torch.tensor([0, 1, 2, 0])
RIGHT = 5 * torch.nn.functional.one_hot(LABELS, 3).float()
WRONG = 5 * torch.nn.functional.one_hot((LABELS + 1) % 3, 3).float()


def test_the_better_model_gets_the_weight() -> None:
    assert choose_weight(RIGHT, WRONG, LABELS) == 1.0
    assert choose_weight(WRONG, RIGHT, LABELS) == 0.0
    assert choose_weight(RIGHT, RIGHT, LABELS) == 0.0, "of two equals the common model"


def test_models_that_are_right_on_different_examples_are_mixed() -> None:
    half = (torch.arange(4) < 2)[:, None]
    own, common = torch.where(half, RIGHT, WRONG), torch.where(half, WRONG, RIGHT)
    weight = choose_weight(own, common, LABELS)
    assert math.isclose(weight, 0.5)
    probabilities = mixture(own, common, weight, "classes").exp()
    torch.testing.assert_close(probabilities, (own.softmax(1) + common.softmax(1)) / 2)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_a_mixture_that_is_better_by_less_than_a_standard_error_is_not_used() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    common = torch.zeros(40, 3)
    common[:, 0] = 1.0
    common[0, 0] = -4.0  # one example by which the own model is better; it is worse on all others
    own = torch.zeros(40, 3)
    own[:, 0] = 0.8
    picked = torch.stack([model.log_softmax(1)[:, 0] for model in (own, common)])
    mixed = mixture(own, common, 0.5, "classes")[:, 0]
    assert mixed.mean() > picked.mean(1).max(), "the mixture is the likeliest of the three"
    assert choose_weight(own, common, labels) == float(picked[0].mean() > picked[1].mean())


def test_without_validation_examples_the_common_model_predicts_and_nobody_teaches() -> None:
    nothing = torch.empty(0, 3)
    assert choose_weight(nothing, nothing, LABELS[:0]) == 0.0
    assert teaching_weight(nothing, nothing, LABELS[:0], most=0.9) == 0.0


def test_a_teacher_that_is_no_better_teaches_nothing() -> None:
    assert teaching_weight(RIGHT, WRONG, LABELS, most=0.9) == 0.0
    assert teaching_weight(RIGHT, RIGHT, LABELS, most=0.9) == 0.0
    assert teaching_weight(WRONG, RIGHT, LABELS, most=0.9) == 0.9


def test_the_teachers_weight_grows_with_its_lead() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    right = 5 * torch.nn.functional.one_hot(labels, 3).float()
    student = right.clone()
    student[:10] = student[:10].roll(1, dims=1)
    assert math.isclose(teaching_weight(student, right, labels, most=0.9), 0.4)
