"""Private training against a slow loop over examples; its noise, its sampling, what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client_app.models.instances import FlatModel, seed_dropout
from client_app.models.registry import build_model
from client_app.training.loop import Teacher, label_loss, make_optimizer, train
from client_app.training.private import (
    Mechanism,
    PrivateStep,
    clipped,
    plan,
    poisson_sample,
    require_private,
    train_privately,
)
from common.config import TrainingSection
from common.errors import ModelError
from tests.unit.client_app.pictures import client_data, draw_theta

SECTION = TrainingSection(batch_size=8, learning_rate=0.01, label_smoothing=0.1)
DATA = client_data(num_train=20)


def made(name: str = "cnn") -> FlatModel:
    module = build_model(name, in_channels=3, num_classes=10)
    seed_dropout(module, torch.Generator().manual_seed(1))
    model = FlatModel(module)
    model.load(draw_theta(module))
    return model


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    return DATA.normalise(DATA.train_images[:count]), DATA.train_labels[:count]


def slow_sum(model: FlatModel, clip: float, teacher: Teacher | None = None) -> Tensor:
    """Clip and add the gradients of one example after the other."""
    images, labels = batch()
    total = torch.zeros_like(model.theta)
    for i in range(len(labels)):
        logits = model.module(images[i : i + 1])
        value = label_loss(logits, labels[i : i + 1], SECTION)
        if teacher:
            value = teacher(images[i : i + 1], logits, labels[i : i + 1], value)
        model.backward(value)
        total += model.gradient * min(1.0, clip / float(model.gradient.norm()))
    return total.detach()


@pytest.mark.parametrize("distils", [False, True])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_clipping_equals_a_loop_over_examples(name: str, distils: bool) -> None:
    model = made(name)
    teacher = Teacher(made("mlp").module, 0.5, 3.0) if distils else None
    step = PrivateStep(model, SECTION, 10, 0.3, teacher if teacher else None)
    found, _ = step.summed(*batch())
    torch.testing.assert_close(found, slow_sum(model, 0.3, teacher), rtol=1e-4, atol=1e-6)
    images, labels = batch()
    norms = [step.of_one(images[i : i + 1], labels[i : i + 1])[0].norm() for i in range(5)]
    assert min(norms) > 0.3, "all of them were clipped"
    assert float(found.norm()) <= 5 * 0.3 + 1e-4


def test_nothing_is_longer_than_the_clip_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the squares of such entries are 0: these gradients would have no length."""
    tiny = torch.full((3, 4000), 1e-24) * torch.tensor([[1.0], [3.0], [0.0]])
    found = clipped(tiny, 1e-30)
    assert found.double().norm(dim=1).max() <= 1e-30 * (1 + 1e-4)
    mixed = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("inf"), 1.0], [float("nan"), 0.0]])
    wanted = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(clipped(mixed, 1.0), wanted)


def of_width(width: int) -> FlatModel:
    layers = [nn.Flatten(), nn.Linear(3072, width), nn.Sigmoid(), nn.Linear(width, 10)]
    return FlatModel(nn.Sequential(*layers))


@pytest.mark.parametrize("model", [made(), made("vit"), of_width(7), of_width(10), of_width(50)])
def test_a_gradient_does_not_depend_on_who_else_is_there(model: FlatModel) -> None:
    """Not in its last bit, wherever in the batch: weights can turn it into all of the gradient."""
    step = PrivateStep(model, SECTION, 10, 1e9)
    images, labels = batch(11)
    wanted = step.summed(images[:1], labels[:1])[0]
    nothing = torch.zeros(1, *images.shape[1:]).fill_(float("inf"))  # counts as nothing
    for place in range(11):
        company = torch.cat([nothing.expand(place, *images.shape[1:]), images[:1]])
        found, _ = step.summed(company, torch.cat([labels[:place], labels[:1]]))
        assert torch.equal(found, wanted), place


def test_without_noise_and_clip_it_is_plain_sgd() -> None:
    """One batch of everybody: the sampling rate is 1."""
    section = SECTION.model_copy(update={"batch_size": 20, "local_epochs": 3})
    private, plain = made(), made()
    unbounded = Mechanism(0.0, 1e9, np.random.default_rng(0))
    lost = train_privately(private, DATA, section, unbounded).loss
    kept = train(plain, DATA, section, generator=torch.Generator().manual_seed(1)).loss
    torch.testing.assert_close(private.theta, plain.theta, rtol=1e-4, atol=1e-6)
    assert lost == pytest.approx(kept, rel=1e-4)


def test_noise_has_the_standard_deviation_that_was_paid_for() -> None:
    """One step without momentum: theta moves by rate (sum + z C noise) / (q n)."""
    section = SECTION.model_copy(update={"batch_size": 20, "momentum": 0.0, "weight_decay": 0.0})
    quiet, loud = made(), made()
    for model, noise in ((quiet, 0.0), (loud, 3.0)):
        train_privately(model, DATA, section, Mechanism(noise, 0.5, np.random.default_rng(0)))
    moved = (loud.theta - quiet.theta).detach() / section.learning_rate * 20
    assert float(moved.std()) == pytest.approx(3.0 * 0.5, rel=0.01)
    assert abs(float(moved.mean())) < 0.02


def test_every_example_is_sampled_at_the_rate_by_itself() -> None:
    rng = np.random.default_rng(0)
    draws = np.zeros((4000, 30))
    for row in draws:
        row[poisson_sample(rng, 30, 0.2).numpy()] = 1
    assert draws.mean(0) == pytest.approx(np.full(30, 0.2), abs=0.035)
    assert draws.sum(1).std() == pytest.approx((30 * 0.2 * 0.8) ** 0.5, rel=0.1), "not a fixed size"
    assert plan(SECTION, 20) == (0.4, 3)


def test_a_sample_without_anybody_is_noise_alone() -> None:
    class Nobody(np.random.Generator):
        def random(self, *_: object, **__: object) -> np.ndarray:  # type: ignore[override]
            return np.ones(20)

    model, before = made(), made().theta.detach()
    rng = Nobody(np.random.PCG64(0))
    assert train_privately(model, DATA, SECTION, Mechanism(1.0, 1.0, rng)).loss == 0.0
    assert float((model.theta - before).detach().abs().min()) > 0


def test_each_example_drops_its_own_entries() -> None:
    model = made("squeezenet1_1")
    step, (images, labels) = PrivateStep(model, SECTION, 10, 1.0), batch(1)
    norms = {round(float(step.of_one(images, labels)[0].norm()), 6) for _ in range(6)}
    assert len(norms) > 1


@pytest.mark.parametrize("name", ["resnet10", "resnet18"])
def test_batchnorm_is_refused_and_groupnorm_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"BatchNorm \(.*GroupNorm.*dp-noise = 0"):
        train_privately(made(name), DATA, SECTION, Mechanism(1.0, 1.0, np.random.default_rng()))
    require_private(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))


def test_a_model_that_remembers_examples_is_refused() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 32 * 32, 10)
            self.register_buffer("mean", torch.zeros(3 * 32 * 32))

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.lerp_(images.flatten(1).mean(0), 0.1)
            return self.head(images.flatten(1) - self.mean)

    with pytest.raises(ModelError, match=r"Remembers changes mean in its forward pass"):
        PrivateStep(FlatModel(Remembers()), SECTION, 10, 1.0).summed(*batch())
    tracks = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(),
                           nn.Linear(3072, 10))  # fmt: skip
    with pytest.raises(ModelError, match=r"changes 0\.running_mean"):
        PrivateStep(FlatModel(tracks), SECTION, 10, 1.0).summed(*batch())


def test_an_example_that_overflows_counts_as_nothing() -> None:
    images, labels = batch(3)
    images[2] = float("inf")
    found, _ = PrivateStep(made(), SECTION, 10, 1.0).summed(images, labels)
    sound, _ = PrivateStep(made(), SECTION, 10, 1.0).summed(images[:2], labels[:2])
    torch.testing.assert_close(found, sound)


def test_the_optimizer_takes_the_expected_batch_not_the_drawn_one() -> None:
    """Else the size of the sample would show."""
    section = SECTION.model_copy(update={"momentum": 0.0, "weight_decay": 0.0, "batch_size": 10})
    model, by_hand, rng = made(), made(), np.random.default_rng(5)
    train_privately(model, DATA, section, Mechanism(0.0, 1.0, np.random.default_rng(5)))
    optimizer = make_optimizer(by_hand.theta, section)
    for _ in range(2):
        rows = poisson_sample(rng, 20, 0.5)
        images, labels = DATA.normalise(DATA.train_images[rows]), DATA.train_labels[rows]
        total, _ = PrivateStep(by_hand, section, 10, 1.0).summed(images, labels)
        rng.standard_normal(len(total), dtype=np.float32)
        optimizer.step(total.detach() / 10)
    torch.testing.assert_close(model.theta, by_hand.theta)
