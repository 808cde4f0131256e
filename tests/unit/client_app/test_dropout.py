"""Dropout: seeded by its own generator, and a word where a model draws from the global one."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.building import drawing_from, watching_draws
from client_app.models.instances import FlatModel, GeneratorDropout, seed_dropout
from client_app.models.registry import build_model
from client_app.training.loop import train
from common.config import TrainingSection
from common.errors import ModelError
from tests.unit.client_app.pictures import client_data


def _seeded(name: str, seed: int) -> nn.Module:
    model = build_model(name, in_channels=3, num_classes=10)
    seed_dropout(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("name", ["vgg8", "squeezenet1_1"])
def test_dropout_depends_on_its_generator_alone(name: str) -> None:
    first, again, other = _seeded(name, 1), _seeded(name, 1), _seeded(name, 2)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    images = torch.randn(8, 3, 32, 32)
    before = torch.random.get_rng_state()
    result = first(images)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)  # a foreign draw changes nothing
    assert torch.equal(again(images), result)
    assert not torch.equal(other(images), result)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Dropout(0.25))
    seed_dropout(model, torch.Generator().manual_seed(0))
    x = torch.ones(100, 100)
    dropped = model(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(model.eval()(x), x)


def test_dropout2d_drops_whole_channels_and_p1_drops_all() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5))
    seed_dropout(model, torch.Generator().manual_seed(0))
    dropped = model(torch.ones(4, 6, 3, 3)).flatten(2)
    assert torch.equal(dropped.amin(2), dropped.amax(2))
    everything = nn.Sequential(nn.Dropout(1.0))
    seed_dropout(everything, torch.Generator())
    assert everything(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_seeding_again_hands_over_and_keeps_names_and_mode() -> None:
    model = build_model("vgg8", in_channels=3, num_classes=10).eval()
    keys = list(model.state_dict())
    seed_dropout(model, torch.Generator().manual_seed(1))
    second = torch.Generator().manual_seed(2)
    seed_dropout(model, second)
    seeded = [m for m in model.modules() if isinstance(m, GeneratorDropout)]
    assert len(seeded) == 2
    assert all(m.generator is second and not m.training for m in seeded)
    assert list(model.state_dict()) == keys


def test_dropout_that_cannot_be_seeded() -> None:
    with pytest.raises(ModelError, match=r"AlphaDropout draws from torch's global generator"):
        seed_dropout(nn.Sequential(nn.AlphaDropout(0.5)), torch.Generator())


def test_dropout_inside_attention_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        seed_dropout(nn.MultiheadAttention(8, 2, dropout=0.1), torch.Generator())
    assert "MultiheadAttention) applies dropout 0.1 inside" in caplog.text


class Noisy(nn.Module):
    """A head on the mean colour, which drops inputs inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x.mean((2, 3)), 0.5, self.training))


def train_once(model: FlatModel) -> None:
    generator = torch.Generator().manual_seed(1)
    train(model, client_data(), TrainingSection(), generator=generator)


def test_draws_inside_forward_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = FlatModel(Noisy())
    with caplog.at_level(logging.WARNING):
        train_once(model)
        train_once(model)
    assert caplog.text.count("Noisy draws from torch's global generator") == 1
    caplog.clear()
    seeded = build_model("vgg8", in_channels=3, num_classes=10)
    seed_dropout(seeded, torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING):
        train_once(FlatModel(seeded))
    assert "global generator" not in caplog.text


def test_what_another_thread_draws_is_not_the_models(caplog: pytest.LogCaptureFixture) -> None:
    """Another's model may be built meanwhile; that draws, and puts the state back."""
    drawing, enough = threading.Event(), threading.Event()

    def draw() -> None:
        with drawing_from(3):
            torch.rand(5)
            drawing.set()
            enough.wait(0.2)

    other = threading.Thread(target=draw)
    with caplog.at_level(logging.WARNING), watching_draws(Noisy(), torch.device("cpu")):
        other.start()
        drawing.wait()
    other.join()
    assert "global generator" not in caplog.text
