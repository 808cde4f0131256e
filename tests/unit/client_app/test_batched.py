"""Training clients together gives what training them one by one gives."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from client_app.data.examples import ClientData
from client_app.data.losses import own_loss
from client_app.data.source import CLASSES
from client_app.models.instances import FlatModel, seed_dropout
from client_app.models.registry import build_model
from client_app.training.batched import (
    Member,
    can_train_together,
    train_cohort,
)
from client_app.training.batched_evaluation import cohort_logits
from client_app.training.loop import Teacher, logits_over, train
from client_app.training.teachers import Teachers
from common.config import TrainingSection
from common.errors import ModelError
from tests.unit.client_app.pictures import client_data, draw_theta

pytestmark = pytest.mark.numeric

COUNTS = (5, 20, 16, 8, 21)  # ragged, one batch, exact batches, and not in order
SECTION = TrainingSection(batch_size=8, learning_rate=0.02)


def clients(device: str = "cpu") -> list[ClientData]:
    found = []
    for shift, count in enumerate(COUNTS):
        whole = client_data()
        found.append(
            replace(
                whole,
                train_images=whole.train_images[shift : shift + count].to(device),
                train_labels=whole.train_labels[shift : shift + count].to(device),
                mean=whole.mean.to(device),
                std=whole.std.to(device),
            )
        )
    return found


def compare(
    module: nn.Module,
    section: TrainingSection,
    *,
    clip: bool = True,
    device: str = "cpu",
    teachers: Teachers | None = None,
    augmentations: tuple[tuple[str, ...], ...] = ((),),
    weighs: bool = False,
) -> None:
    own = torch.Generator(device)
    seed_dropout(module, own)
    model = FlatModel(module.to(device))
    start = draw_theta(module).to(device)
    fresh = {name: b.detach().clone() for name, b in module.named_buffers()}
    members, expected = [], []
    for i, plain in enumerate(clients(device)):
        data = replace(plain, augmentation=augmentations[i % len(augmentations)])
        if weighs:  # everybody otherwise
            words = ",".join(str(1 + (i * c) % 7) for c in range(10)) if i else "balanced"
            data = replace(data, loss=own_loss(words, data.train_labels, CLASSES, 10))
        theta = start * (1 + 0.1 * i)
        drops = torch.Generator(device).manual_seed(100 + i)
        members.append(Member(theta, fresh, data, torch.Generator().manual_seed(i), drops))
        model.load(theta)
        own.manual_seed(100 + i)
        for name, buffer in module.named_buffers():
            buffer.copy_(fresh[name])
        order = torch.Generator().manual_seed(i)
        loss = teacher_of(teachers, i) if teachers else None
        trained = train(model, data, section, generator=order, loss=loss, clip=clip)
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        expected.append((model.theta.detach().clone(), buffers, trained))
    outcomes = train_cohort(module, members, section, clip=clip, teachers=teachers)
    for outcome, (theta, buffers, trained) in zip(outcomes, expected, strict=True):
        # where a gradient is no more than rounding, AdamW's step is as long as elsewhere, and may
        # go the other way: single weights are a step or two apart, the whole of them is not
        atol = 1e-5 if section.optimizer == "sgd" else 2 * section.learning_rate
        torch.testing.assert_close(outcome.theta, theta, rtol=1e-4, atol=atol)
        assert (outcome.theta - theta).norm() < 1e-3 * (theta - start).norm()
        assert outcome.buffers.keys() == buffers.keys()
        for name, buffer in buffers.items():
            torch.testing.assert_close(outcome.buffers[name], buffer, rtol=1e-4, atol=1e-5)
        assert outcome.trained.num_examples == trained.num_examples
        assert outcome.trained.loss == pytest.approx(trained.loss, rel=1e-4)


def teachers(count: int) -> Teachers:
    """One teacher for all, or everybody's own; and everybody's weight of it."""
    module = small_normed()
    factors = torch.linspace(0.5, 2.0, count)
    state = {
        k: torch.stack([(f * x).to(x) for f in factors]) for k, x in module.state_dict().items()
    }
    return Teachers(module, state, torch.linspace(0.0, 0.8, len(COUNTS)), 4.0)


def teacher_of(teachers: Teachers, client: int) -> Teacher:
    module = deepcopy(teachers.module)
    module.load_state_dict({k: x[client % len(x)] for k, x in teachers.state.items()})
    return Teacher(module, float(teachers.alphas[client]), teachers.temperature)


def small_normed(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        # a bias before BatchNorm has a gradient of rounding alone, which AdamW makes a whole step
        nn.Conv2d(3, 4, 3, stride=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 10),
    )


@pytest.mark.parametrize(
    ("model", "epochs", "clip_norm"),
    [
        ("cnn", 1, 0.5),
        ("mlp", 2, 0.5),
        ("mlp", 1, None),
        ("vgg8", 1, 50.0),  # dropout draws what each client alone would draw
        (small_normed(), 1, 50.0),  # BatchNorm never sees padding
        (small_normed(0.3), 1, 50.0),
    ],
)
def test_cohort_equals_one_by_one_with_padding(
    model: str | nn.Module, epochs: int, clip_norm: float | None
) -> None:
    section = SECTION.model_copy(
        update={"client_clip_norm": clip_norm or 50.0, "local_epochs": epochs}
    )
    if isinstance(model, str):
        model = build_model(model, in_channels=3, num_classes=10)
    compare(model, section, clip=clip_norm is not None)


@pytest.mark.parametrize("model", ["mlp", "normed"])
@pytest.mark.parametrize("num_teachers", [0, len(COUNTS)])
def test_everybody_weighs_classes_as_it_likes(model: str, num_teachers: int) -> None:
    mlp = build_model("mlp", in_channels=3, num_classes=10)
    section = SECTION.model_copy(update={"label_smoothing": 0.3})  # not of a loss of one's own
    found = teachers(num_teachers) if num_teachers else None
    compare(small_normed() if model == "normed" else mlp, section, teachers=found, weighs=True)


@pytest.mark.parametrize("num_teachers", [1, len(COUNTS)])
@pytest.mark.parametrize("student", ["mlp", "normed"])
def test_distillation(student: str, num_teachers: int) -> None:
    mlp = build_model("mlp", in_channels=3, num_classes=10)
    module = small_normed() if student == "normed" else mlp
    compare(module, SECTION, teachers=teachers(num_teachers))


@pytest.mark.parametrize("model", ["mlp", "normed"])
def test_augmentation_adamw_and_smoothing(model: str) -> None:
    module = (
        small_normed(0.3)
        if model == "normed"
        else build_model("mlp", in_channels=3, num_classes=10)
    )
    recipe = {
        "local_epochs": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "label_smoothing": 0.1,
    }
    compare(
        module,
        SECTION.model_copy(update=recipe),
        teachers=teachers(1),
        augmentations=(("flip", "crop"), (), ("flip",)),
    )


def test_mixed_precision_agrees_to_its_rounding() -> None:
    module, theta = build_model("cnn", in_channels=3, num_classes=10), []
    data, section = clients()[1], SECTION.model_copy(update={"training_precision": "bfloat16"})
    start = draw_theta(module)
    outcome, _ = train_cohort(
        module,
        [Member(start, {}, data, torch.Generator().manual_seed(i)) for i in range(2)],
        section,
    )
    for kept in (SECTION, section):
        model = FlatModel(module)
        model.load(start)
        train(model, data, kept, generator=torch.Generator().manual_seed(0))
        theta.append(model.theta.detach().clone())
    exact, alone = theta
    assert 0 < (outcome.theta - exact).norm() < 0.2 * (exact - start).norm()
    assert (outcome.theta - alone).norm() < 0.2 * (exact - start).norm()


@pytest.mark.parametrize("counts", [(5, 8, 11), (3, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("name", ["cnn", "resnet10"])
def test_cohort_is_tested_as_one_by_one(
    name: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "client_app.training.batched_evaluation.TESTED_AT_ONCE", {"cpu": 12}
    )  # several batches
    module = build_model(name, in_channels=3, num_classes=10)
    model, members, expected = FlatModel(module), [], []
    for i, (whole, count) in enumerate(zip(clients(), counts, strict=False)):
        data = replace(
            whole,
            validation_images=whole.train_images[:count],
            validation_labels=whole.train_labels[:count],
            test_images=whole.test_images[: 5 + i],
        )
        model.load(draw_theta(module) * (1 + i))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(i))
        buffers = {key: b.detach().clone() for key, b in module.named_buffers()}
        members.append(Member(model.theta.detach().clone(), buffers, data, torch.Generator()))
        expected.append([logits_over(model, data, validation=v) for v in (False, True)])
    for part, validation in enumerate((False, True)):
        found = cohort_logits(module, members, validation=validation)
        assert [len(x) for x in found] == (list(counts) if validation else [5, 6, 7])
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one[part], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cnn", "mlp", "vgg8", "vit"])
def test_cohort_equals_one_by_one_on_a_gpu(name: str) -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        compare(build_model(name, in_channels=3, num_classes=10), SECTION, device="cuda")
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Own(nn.Module):
    """A layer that the project does not know."""


Own.__module__ = "participants_own"


def test_a_layer_of_ones_own_is_refused() -> None:
    model = nn.Sequential(Own(), nn.Linear(2, 2))
    assert not can_train_together(model)
    with pytest.raises(ModelError, match="cannot be trained for several clients at once"):
        train_cohort(model, [], SECTION)


def test_layers_that_share_weights_are_not_batched() -> None:
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    for model in ([layer, nn.ReLU(), tied], [layer, nn.ReLU(), layer], [norm, layer, norm]):
        assert not can_train_together(nn.Sequential(*model))
    relu = nn.ReLU()
    assert can_train_together(nn.Sequential(relu, layer, relu))


def test_dropout_without_a_generator_is_refused() -> None:
    model = build_model("vgg8", in_channels=3, num_classes=10)
    seed_dropout(model, torch.Generator())
    theta = draw_theta(model)
    member = Member(theta, {}, clients()[0], torch.Generator())
    with pytest.raises(ValueError, match="needs a generator"):
        train_cohort(model, [member], SECTION)
