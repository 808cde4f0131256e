"""What participants have beside pictures: tables, series, texts, volumes, and divisions of own."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from client_app.models.building import fitting
from client_app.models.registry import build_model
from client_app.personal import read_predictor
from client_app.shelf import LAST, Shelf
from common.errors import ModelError
from experiments.__main__ import main
from tests.support.joining import checked, settings
from tests.support.outputs import rows
from tests.support.tiny import run_tiny, tiny_config, trusting

HERE = __name__
CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]
Pair = tuple[NDArray[Any], NDArray[Any]]


# --- four kinds of data, and a model of a participant's own for each ------------------------------


def cancer() -> Pair:
    table = load_breast_cancer()
    inputs = (table.data - table.data.mean(0)) / table.data.std(0)
    return inputs, table.target


def sensors() -> Pair:
    """Three channels of 40 steps; the class is how fast the first one swings."""
    rng = np.random.default_rng(0)
    labels = np.arange(360) % 3
    speed = (labels[:, None] + 1) * np.linspace(0, 6, 40) + rng.uniform(0, 6, (360, 1))
    series = np.stack([np.sin(speed), np.cos(speed), np.zeros_like(speed)], axis=1)
    return (series + rng.normal(0, 0.2, series.shape)).astype(np.float32), labels


def texts() -> Pair:
    """Twelve words out of 60, of which each class has ten of its own; 0 fills up."""
    rng = np.random.default_rng(1)
    labels = np.arange(400) % 4
    own = 1 + 10 * labels[:, None] + rng.integers(0, 10, (400, 12))
    words = np.where(rng.random((400, 12)) < 0.5, own, rng.integers(41, 61, (400, 12)))
    words[:, 9:] *= rng.integers(0, 2, (400, 3))
    return words, labels


def volumes() -> Pair:
    """One channel, 8x8x8; the class is in which half it is bright."""
    rng = np.random.default_rng(2)
    labels = np.arange(300) % 2
    scans = rng.normal(0, 1, (300, 1, 8, 8, 8)).astype(np.float32)
    scans[labels == 1, :, :4] += 0.7
    return scans, labels


def mlp(*, in_channels: int, num_classes: int) -> nn.Module:
    layers = [nn.Linear(in_channels, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, num_classes)]
    return nn.Sequential(*layers)


class Recurrent(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, 16, batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.gru(series.transpose(1, 2))[0][:, -1])


def gru(*, in_channels: int, num_classes: int) -> nn.Module:
    return Recurrent(in_channels, num_classes)


class Reader(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 16, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.words(tokens)).mean(1))


def transformer(*, in_channels: int, num_classes: int) -> nn.Module:
    return Reader(num_classes)


def cubes(*, in_channels: int, num_classes: int) -> nn.Module:
    layers = [nn.Conv3d(in_channels, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))


KINDS: dict[str, tuple[Callable[[], Pair], Callable[..., nn.Module], str, float]] = {
    "table": (cancer, mlp, "perceptron", 0.92),
    "series": (sensors, gru, "conv1d", 0.8),
    "text": (texts, transformer, "tokens", 0.8),
    "volume": (volumes, cubes, "conv3d", 0.8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_federation_of_tensors_learns_and_gives_everybody_a_model(
    kind: str, tmp_path: Path
) -> None:
    source, factory, common, wanted = KINDS[kind]
    config = tiny_config(
        tmp_path, method="mh-pfedhn-pg", server_rule="kernel", rounds=4, local_epochs=8,
        dataset=f"{HERE}:{source.__name__}", models=f"{HERE}:{factory.__name__},{common}",
        num_partitions=2, global_model="auto", optimizer="adamw", learning_rate=0.01,
        validation_fraction=0.1, measure_alone=True, evaluate_every=4,
    )  # fmt: skip
    nodes = [
        {
            "client-id": f"site-{i}",
            "partition-id": i,
            "state-dir": str(tmp_path / "state"),
            **trusting(tmp_path, f"{HERE}:{factory.__name__}" if i else common),
            "dataset": f"{HERE}:{source.__name__}",
            "global-model": "auto",
        }
        for i in range(2)
    ]
    run_tiny(config, node_configs=nodes)
    last = rows(config)[-1]
    assert last["accuracy_micro"] > wanted
    assert {"accuracy_own", "accuracy_common", "accuracy_alone"} <= last.keys()
    for site in (0, 1):
        found = Shelf(tmp_path / "state" / f"site-{site}").find(LAST)
        module, about = read_predictor(found.folder)
        assert about["common_model"] == common
        inputs, labels = source()
        chosen = np.load(found.folder / "test_rows.npy")
        tensor = torch.from_numpy(inputs[chosen])
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        truth = torch.from_numpy(labels[chosen])
        assert int((module(tensor).argmax(1) == truth).sum()) == about["num_correct"]
        program = torch.export.load(found.folder / "personal_model.pt2").module()
        assert torch.allclose(program(tensor), module(tensor), atol=1e-4)


def test_a_model_of_tensors_is_used_without_code(tmp_path: Path, capsys: Capture) -> None:
    config = tiny_config(
        tmp_path, rounds=2, dataset=f"{HERE}:cancer", models="perceptron", local_epochs=3,
        optimizer="adamw", learning_rate=0.01, server_rule="kernel",
    )  # fmt: skip
    own = trusting(tmp_path, "perceptron") | {"dataset": f"{HERE}:cancer", "partition": "none"}
    run_tiny(config, node_configs=[{"client-id": "a", "state-dir": str(tmp_path / "s"), **own}])
    state, data, out = str(tmp_path / "s" / "a"), tmp_path / "new.npz", tmp_path / "found.csv"
    inputs, labels = cancer()
    np.savez(data, inputs=inputs, labels=labels)
    assert main(["model", "evaluate", state, str(data)]) == 0
    assert "569 examples of 2 classes" in capsys.readouterr().out
    assert main(["model", "predict", state, str(data), str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert found[0].keys() == {"row", "class", "p(0)", "p(1)"}
    assert np.mean([int(row["class"]) == y for row, y in zip(found, labels, strict=True)]) > 0.9
    np.savez(data, inputs=inputs[:, :5])
    assert main(["model", "predict", state, str(data), str(tmp_path / "x.csv")]) == 2
    assert "must be (N, ...) of {'inputs': [30]}" in capsys.readouterr().err
    assert main(["model", "export", state, str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "personal_model.json").read_text())
    assert about["input_shape"] == [30]
    assert about["input"] == "float32 (B, ...), as the data set gives them"


# --- what does not fit says so --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        ("cnn", (2, 30), "cnn takes pictures"),
        ("perceptron", (2, 30, 4), "perceptron takes examples of 1 axes"),
        ("conv1d", (2, 30), "conv1d takes examples of 2 axes"),
        ("tokens", (2, 30), "tokens takes whole numbers"),
    ],
)
def test_a_model_for_other_data_says_so(model: str, shape: Sequence[int], words: str) -> None:
    built = build_model(model, in_channels=30, num_classes=2)
    with pytest.raises(ModelError, match=words):
        built(torch.zeros(*shape))


def test_the_common_model_fits_the_data() -> None:
    floats = {"is_pictures": False, "is_floats": True}
    assert [fitting((3,) * n, **floats) for n in (1, 2, 3, 4)] == [
        "perceptron", "conv1d", "conv2d", "conv3d"
    ]  # fmt: skip
    assert fitting((3, 32, 32), is_pictures=True, is_floats=False) == "cnn"
    assert fitting((40,), is_pictures=False, is_floats=False) == "tokens"


def test_a_site_with_a_table_is_checked(tmp_path: Path) -> None:
    own = {"dataset": f"{HERE}:cancer", "model": f"{HERE}:mlp", "split-seed": 0}
    good, text = checked(settings(tmp_path, **own, **{"cache-dir": str(tmp_path / "cache")}))
    assert good, text
    assert "2 classes (154, 273 to train), each 30, mean -0.01" in text
    assert ":mlp, 794 parameters" in text
