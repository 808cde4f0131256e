"""Early stopping: the best epoch's weights come back, and no epoch after it is enough."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from client_app.data.examples import ClientData
from client_app.models.instances import FlatModel
from client_app.training.early import train_to_best
from client_app.training.loop import logits_over, loss_of, train
from common.config import RunConfig, TrainingSection, declared
from common.errors import ConfigError
from tests.unit.client_app.pictures import client_data, draw_theta


def fresh() -> FlatModel:
    """A small model with running statistics."""
    features = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)
    model = FlatModel(nn.Sequential(*features, *head))
    model.load(draw_theta(model.module))
    return model


def judging(data: ClientData) -> ClientData:
    """Its test examples, labelled at random, are its validation examples: learning harms there."""
    return replace(data, validation_images=data.test_images, validation_labels=data.test_labels)


def section(epochs: int, patience: int) -> TrainingSection:
    return TrainingSection(
        batch_size=16, learning_rate=0.02, local_epochs=epochs, local_patience=patience
    )


def loss_by_epoch(data: ClientData, epochs: int) -> list[float]:
    """Train anew for 1, 2, ... epochs; return each one's validation loss."""
    found = []
    for count in range(1, epochs + 1):
        model = fresh()
        train(model, data, section(count, 0), generator=torch.Generator().manual_seed(5))
        logits = logits_over(model, data, validation=True)
        found.append(float(loss_of(logits.double(), data.validation_labels)))
    return found


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The validation loss of each of six epochs."""
    return loss_by_epoch(judging(client_data()), 6)


@pytest.mark.parametrize("patience", [1, 2, 50])
def test_the_best_epoch_comes_back(losses: list[float], patience: int) -> None:
    data, epochs = judging(client_data()), len(losses)
    best = waited = 0
    for epoch in range(1, epochs):
        if losses[epoch] < losses[best]:
            best, waited = epoch, 0
        else:
            waited += 1
        if waited == patience:
            break
    assert best < epochs - 1, "these examples have to be such that more training harms"
    model, clear = fresh(), fresh()
    stopped, whole = (torch.Generator().manual_seed(5) for _ in range(2))
    train_to_best(model, data, section(epochs, patience), generator=stopped)
    train(clear, data, section(best + 1, 0), generator=whole)
    assert torch.equal(model.theta, clear.theta)
    for (name, mine), theirs in zip(
        model.module.named_buffers(), clear.module.buffers(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    drawn = torch.Generator().manual_seed(5)
    for _ in range(min(epochs, best + 1 + waited)):
        list(data.batches(16, drawn))
    assert torch.equal(stopped.get_state(), drawn.get_state()), "it trained for other epochs"


def test_a_loss_of_ones_own_says_which_epoch_is_best() -> None:
    """One that grows with every epoch: the first is kept."""
    epochs_judged = []

    def worse(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not outputs.requires_grad:
            epochs_judged.append(1)
        plain = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
        return plain + len(epochs_judged)

    data = replace(judging(client_data()), loss=worse)
    model, clear = fresh(), fresh()
    train_to_best(model, data, section(4, 2), generator=torch.Generator().manual_seed(5))
    train(clear, data, section(1, 0), generator=torch.Generator().manual_seed(5))
    assert len(epochs_judged) == 3
    assert torch.equal(model.theta, clear.theta)


def test_it_needs_validation_examples() -> None:
    with pytest.raises(ConfigError, match=r"local-patience = 2 .* there are none"):
        train_to_best(fresh(), client_data(), section(3, 2), generator=torch.Generator())


def test_it_does_not_go_with_private_training() -> None:
    keys = {"local-patience": 2, "dp-noise": 1.0}
    with pytest.raises(ConfigError, match=r"run config: local-patience = 2 with dp-noise = 1"):
        RunConfig.parse(keys)
    own = {"client-id": "site", "state-dir": "s", **keys}
    with pytest.raises(ConfigError, match=r"node config: local-patience = 2 with dp-noise"):
        declared((), tuple(own.items()))
