"""Training clients together gives what training them one by one gives."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from client_app.cohort import Member, can_train_together, train_cohort
from client_app.data import ClientData
from client_app.models.dropout import seed_dropout
from client_app.models.registry import build_model
from client_app.training import train
from common.config import TrainingSection
from common.errors import ModelError
from common.params import FlatModel
from tests.unit.client_app.test_training_speed import draw_theta, pictures

COUNTS = (5, 20, 16, 8, 21)  # ragged, one batch, exact batches, and not in order
SECTION = TrainingSection(batch_size=8, learning_rate=0.02)


def clients(device: str = "cpu") -> list[ClientData]:
    found = []
    for shift, count in enumerate(COUNTS):
        whole = pictures()
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
    module: nn.Module, section: TrainingSection, *, clip: bool = True, device: str = "cpu"
) -> None:
    model = FlatModel(module.to(device))
    start = draw_theta(module).to(device)
    fresh = {name: b.detach().clone() for name, b in module.named_buffers()}
    members, expected = [], []
    for i, data in enumerate(clients(device)):
        theta = start * (1 + 0.1 * i)
        members.append(Member(theta, fresh, data, torch.Generator().manual_seed(i)))
        model.load(theta)
        for name, buffer in module.named_buffers():
            buffer.copy_(fresh[name])
        trained = train(model, data, section, generator=torch.Generator().manual_seed(i), clip=clip)
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        expected.append((model.theta.detach().clone(), buffers, trained))
    outcomes = train_cohort(module, members, section, clip=clip)
    for outcome, (theta, buffers, trained) in zip(outcomes, expected, strict=True):
        torch.testing.assert_close(outcome.theta, theta, rtol=1e-4, atol=1e-5)
        assert outcome.buffers.keys() == buffers.keys()
        for name, buffer in buffers.items():
            torch.testing.assert_close(outcome.buffers[name], buffer, rtol=1e-4, atol=1e-5)
        assert outcome.trained.num_examples == trained.num_examples
        assert outcome.trained.loss == pytest.approx(trained.loss, rel=1e-4)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_cohort_equals_one_by_one_with_padding(name: str) -> None:
    epochs = 2 if name == "mlp" else 1
    section = SECTION.model_copy(update={"client_clip_norm": 0.5, "local_epochs": epochs})
    compare(build_model(name, in_channels=3, num_classes=10), section)


def test_without_clip() -> None:
    compare(build_model("mlp", in_channels=3, num_classes=10), SECTION, clip=False)


def small_resnet() -> nn.Module:
    generator = torch.Generator()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 10),
    )
    seed_dropout(model, generator)
    return model


def test_batchnorm_never_sees_padding() -> None:
    compare(small_resnet(), SECTION)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_cohort_equals_one_by_one_on_a_gpu(name: str) -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        compare(build_model(name, in_channels=3, num_classes=10), SECTION, device="cuda")
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_dropout_is_refused() -> None:
    model = build_model("vgg8", in_channels=3, num_classes=10)
    seed_dropout(model, torch.Generator())
    assert not can_train_together(model)
    with pytest.raises(ModelError, match="cannot be trained for several clients at once"):
        train_cohort(model, [], SECTION)
