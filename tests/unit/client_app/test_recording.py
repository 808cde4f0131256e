"""Training steps that are recorded and replayed, against steps taken one by one."""

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from client_app.models.instances import FlatModel, seed_dropout
from client_app.models.registry import build_model
from client_app.training import recording
from client_app.training.loop import Loss, Teacher, Trained, train
from client_app.training.recording import Recorder
from common.config import TrainingSection
from tests.support.tape import Tape
from tests.unit.client_app.pictures import client_data, draw_theta

DATA = client_data(num_train=20)
SECTION = TrainingSection(batch_size=8, local_epochs=2, learning_rate=1e-3)
"""Two full batches and a short one in each epoch; steps so short that rounding stays small."""


def made(name: str, *, capture: Tape | None = None) -> FlatModel:
    module = build_model(name, in_channels=3, num_classes=10)
    generator = torch.Generator().manual_seed(3)
    seed_dropout(module, generator)
    model = FlatModel(module)
    model.load(draw_theta(module))
    record(model, capture)
    return model


def record(model: FlatModel, capture: Tape | None) -> None:
    model.recorder = Recorder(model.module, model.theta, capture) if capture else None


def trained(
    model: FlatModel, section: TrainingSection, seed: int, loss: Loss | None = None
) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    return train(model, DATA, section, generator=generator, loss=loss)


def assert_alike(one: FlatModel, other: FlatModel) -> None:
    """Up to a thousandth of how far the training went: AdamW enlarges what rounding leaves."""
    start = draw_theta(one.module)
    assert apart(one.theta.detach(), other.theta.detach(), start) < 1e-3
    for x, y in zip(one.module.buffers(), other.module.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def apart(one: Tensor, other: Tensor, start: Tensor) -> float:
    return float((one - other).norm() / (one - start).norm())


@pytest.mark.parametrize("name", ["resnet10", "vgg8", "vit"])
def test_replayed_steps_are_the_steps_themselves(name: str) -> None:
    """BatchNorm, dropout and attention; a short last batch; the second round replays alone."""
    tape = Tape()
    plain, taped = made(name), made(name, capture=tape)
    for seed in (1, 2):
        found = [trained(model, SECTION, seed) for model in (plain, taped)]
        assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert tape.num_recordings == 2  # one for each batch shape
    assert tape.num_replays == 2 + 2 + 6
    assert_alike(plain, taped)


def rounds(optimizer: str, precision: str) -> list[TrainingSection]:
    rates = (0.02, 0.01, 0.005)
    keys = {"optimizer": optimizer, "training-precision": precision, "label-smoothing": 0.1}
    return [
        TrainingSection.model_validate({"batch-size": 8, "learning-rate": rate, **keys})
        for rate in rates
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_rate_and_the_teachers_weight_may_change(optimizer: str, precision: str) -> None:
    tape, teacher = Tape(), made("cnn").module
    plain, taped = made("mlp"), made("mlp", capture=tape)
    for seed, section in enumerate(rounds(optimizer, precision)):
        loss = Teacher(teacher, 0.3 * seed, 3.0)
        for model in (plain, taped):
            trained(model, section, seed, loss)
    assert tape.num_recordings == 2
    assert_alike(plain, taped)


def test_another_recipe_or_teacher_is_recorded_anew() -> None:
    tape = Tape()
    model = made("mlp", capture=tape)
    teachers = [Teacher(made("mlp").module, 0.5, 3.0) for _ in range(2)]
    smoothed = SECTION.model_copy(update={"label_smoothing": 0.1})
    for section, loss in itertools.product((SECTION, smoothed), (None, *teachers)):
        trained(model, section, 0, loss)
    assert tape.num_recordings == 2 * 2 * 3
    assert model.recorder
    assert len(model.recorder._recordings) == recording.MOST_RECIPES


class Waiting(nn.Module):
    """Looks at a value in its forward pass, which a GPU's graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits * 2 if float(logits.detach().abs().max()) > 1e6 else logits


class Counting(Waiting):
    """Counts its calls, in Python."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.head(x.flatten(1))
        return logits * (1 + self.calls % 2)


class Throwing(Waiting):
    """Throws a die, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits * random.random()


class Renewing(Waiting):
    """Puts a new tensor in its buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        logits: Tensor = self.head(x.flatten(1))
        return logits * self.count


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Waiting, "not permitted when stream is capturing"),
        (Counting, "changes Python values"),
        (Throwing, "changes Python values"),
        (Renewing, "changes Python values"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(
    kind: type[nn.Module], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, taped = (FlatModel(kind()) for _ in range(2))
    for model in (plain, taped):
        model.load(draw_theta(plain.module))
    record(taped, Tape())
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            for model in (plain, taped):
                random.seed(seed)
                trained(model, SECTION, seed)
    assert_alike(plain, taped)
    said = [record.message for record in caplog.records if "CUDA graph" in record.message]
    assert len(said) == 1
    assert why in said[0]


class Idle(Tape):
    """A device whose replays do half of what they should."""

    def __call__(
        self, run: Callable[[], None], generators: Sequence[torch.Generator]
    ) -> Callable[[], None]:
        again = super().__call__(run, generators)
        del self._operations[len(self._operations) // 2 :]
        return again


def test_a_replay_that_does_something_else_is_not_believed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, taped = made("cnn"), made("cnn", capture=Idle())
    for model in (plain, taped):
        trained(model, SECTION, 1)
    assert_alike(plain, taped)
    assert "a replay does not do what the step does" in caplog.text


def test_a_method_with_a_loss_of_its_own_is_not_recorded() -> None:
    tape = Tape()
    model = made("mlp", capture=tape)
    trained(model, SECTION, 1, lambda _images, _logits, _labels, value: value * 2)
    assert not tape.num_recordings


def test_odd_batches_are_recorded_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_SHAPES", 2)
    tape = Tape()
    plain, taped = made("mlp"), made("mlp", capture=tape)
    for count, _ in itertools.product((10, 11, 12), range(2)):
        data = replace(
            DATA, train_images=DATA.train_images[:count], train_labels=DATA.train_labels[:count]
        )
        for model in (plain, taped):
            generator = torch.Generator().manual_seed(count)
            train(model, data, SECTION, generator=generator)
    assert tape.num_recordings == 2
    assert_alike(plain, taped)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cnn", "resnet10", "vgg8", "vit", "squeezenet1_1"])
def test_a_gpu_replays_what_it_would_do(name: str) -> None:
    device = torch.device("cuda")
    moved = {
        field: getattr(DATA, field).to(device)
        for field in DATA.__dataclass_fields__
        if isinstance(getattr(DATA, field), Tensor)
    }
    data, models = replace(DATA, **moved), []
    for records in (False, True):
        module = build_model(name, in_channels=3, num_classes=10).to(device)
        seed_dropout(module, torch.Generator(device).manual_seed(3))
        model = FlatModel(module)
        model.load(draw_theta(build_model(name, in_channels=3, num_classes=10)).to(device))
        model.recorder = model.recorder if records else None
        for seed in (1, 2):
            train(model, data, SECTION, generator=torch.Generator().manual_seed(seed))
        models.append(model)
    assert models[1].recorder
    assert all(one._replays for one in models[1].recorder._recordings.values())
    start = draw_theta(build_model(name, in_channels=3, num_classes=10)).to(device)
    assert apart(models[0].theta.detach(), models[1].theta.detach(), start) < 0.02
