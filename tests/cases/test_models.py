"""Models as participants write them: each is used as it is meant, or refused with what to do."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.models.building import ModelKind, built, draw_theta
from client_app.models.instances import FlatModel, instance_of
from client_app.personal import PersonalModel
from client_app.training.loop import logits_over, num_correct
from common.errors import MHpFedHNError, RunError
from common.messages import Evaluation
from tests.support import tiny
from tests.support.joining import checked, settings
from tests.support.outputs import client_rows, rows
from tests.support.tiny import run_tiny, tiny_config, trusting
from tests.unit.client_app.pictures import client_data

HERE = __name__
CPU = torch.device("cpu")


def body(channels: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers)


def plain(*, in_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(body(in_channels), nn.Linear(32, num_classes))


class MaxNorm(nn.Module):
    def __init__(self, channels: int, classes: int, in_place: bool) -> None:
        super().__init__()
        self.body, self.out, self.in_place = body(channels), nn.Linear(32, classes), in_place

    def forward(self, x: Tensor) -> Tensor:
        bounded = torch.renorm(self.out.weight.data, p=2, dim=0, maxnorm=1.0)
        if self.in_place:
            with torch.no_grad():
                self.out.weight.copy_(bounded)
        else:
            self.out.weight.data = bounded
        return self.out(self.body(x))


def max_norm_by_data(*, in_channels: int, num_classes: int) -> nn.Module:
    return MaxNorm(in_channels, num_classes, in_place=False)


def max_norm_in_place(*, in_channels: int, num_classes: int) -> nn.Module:
    return MaxNorm(in_channels, num_classes, in_place=True)


class Tied(nn.Module):
    """One matrix twice, one module under two names, one buffer under two names."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body, self.a, self.b = body(channels), nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight
        self.again, self.out = self.a, nn.Linear(32, classes)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("same", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(torch.relu(self.again(self.body(x) * self.scale)))))


def tied(*, in_channels: int, num_classes: int) -> nn.Module:
    return Tied(in_channels, num_classes)


class Returns(nn.Module):
    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Any:
        y = self.model(x)
        return {"tuple": (y, y), "dict": {"logits": y}}[self.kind]


def returns_tuple(*, in_channels: int, num_classes: int) -> nn.Module:
    return Returns(plain(in_channels=in_channels, num_classes=num_classes), "tuple")


def returns_dict(*, in_channels: int, num_classes: int) -> nn.Module:
    return Returns(plain(in_channels=in_channels, num_classes=num_classes), "dict")


class RandomFeatures(nn.Module):
    def __init__(self, channels: int, classes: int, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(channels * 64, 64) / 8, persistent=persistent)
        self.out = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cos(x.flatten(1) @ self.w))


def random_features(*, in_channels: int, num_classes: int) -> nn.Module:
    return RandomFeatures(in_channels, num_classes, persistent=True)


def random_features_not_stored(*, in_channels: int, num_classes: int) -> nn.Module:
    return RandomFeatures(in_channels, num_classes, persistent=False)


def drawn_by_numpy(*, in_channels: int, num_classes: int) -> nn.Module:
    model = plain(in_channels=in_channels, num_classes=num_classes)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(np.random.normal(0, 0.1, tuple(p.shape))))
    return model


@functools.lru_cache
def one_object(*, in_channels: int, num_classes: int) -> nn.Module:
    return plain(in_channels=in_channels, num_classes=num_classes)


def batch_norm_1d(*, in_channels: int, num_classes: int) -> nn.Module:
    layers = [nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes)]
    return nn.Sequential(body(in_channels), *layers)


def federation(folder: Path, name: str, module: str = HERE, **settings: Any) -> Any:
    """Two clients with this model; the run's config."""
    made: dict[str, Any] = {
        "models": f"{module}:{name}", "global_model": f"{HERE}:plain", "server_rule": "kernel",
        "rounds": 3, "state_dir": str(folder / "state"), "num_partitions": 2, **settings,
    }  # fmt: skip
    config = tiny_config(folder, **made)
    run_tiny(config, num_clients=2)
    return config


def stored(folder: Path, client: str = "0") -> Path:
    return folder / "state" / client


def test_another_tensor_in_a_parameters_place_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunError):
        federation(tmp_path, "max_norm_by_data")
    assert "MaxNorm has replaced the tensor of out.weight" in caplog.text
    assert "out.weight.copy_(...)" in caplog.text
    config = federation(tmp_path / "good", "max_norm_in_place")
    assert rows(config)[-1]["accuracy_micro"] > 0.5


def test_shared_weights_are_stored_and_loaded(tmp_path: Path) -> None:
    config = federation(tmp_path, "tied")
    model = tied(in_channels=1, num_classes=4)
    model.load_state_dict(load_file(stored(tmp_path) / "personal_model.safetensors"))
    assert torch.equal(model.a.weight, model.b.weight)
    assert (stored(tmp_path) / "personal_model.pt2").is_file()
    assert [row["client_id"] for row in client_rows(config)] == ["0", "1"]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_what_is_not_one_tensor_is_named(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunError):
        federation(tmp_path, f"returns_{kind}")
    assert f"Returns returns a {kind}; expected one tensor of logits" in caplog.text
    assert "output[0], output.logits" in caplog.text


def test_the_program_has_what_no_state_dict_has(tmp_path: Path) -> None:
    config = federation(tmp_path, "random_features_not_stored")
    about = json.loads((stored(tmp_path) / "personal_model.json").read_text())
    assert about["not_in_state_dict"] == ["w"]
    model = torch.export.load(stored(tmp_path) / about["program"]).module()
    images, labels = tiny.patterns()
    test = np.load(stored(tmp_path) / "test_rows.npy")
    correct = model(torch.from_numpy(images[test])[:, None]).argmax(1).numpy() == labels[test]
    assert correct.sum() == about["num_correct"] == int(client_rows(config)[0]["correct"])


def test_a_program_that_is_another_model_is_not_stored(tmp_path: Path) -> None:
    """It is tried on the participant's own test examples, against the run's count."""
    data = client_data(num_train=8, num_test=40)
    model = plain(in_channels=3, num_classes=10).eval()
    correct = num_correct(logits_over(FlatModel(model), data), data.test_labels)
    for told, is_stored in ((correct, True), (correct + 5, False)):
        found = PersonalModel(f"{HERE}:plain", model, data, Evaluation(40, told, 1.0))
        found.store(tmp_path, program=True)
        about = json.loads((tmp_path / "personal_model.json").read_text())
        assert (tmp_path / "personal_model.pt2").exists() == is_stored == bool(about["program"])
    assert f"gets {correct} of 40 test examples right" in about["program_error"]


@pytest.mark.parametrize(
    "name", ["random_features", "random_features_not_stored", "drawn_by_numpy"]
)
def test_what_a_model_draws_comes_from_the_runs_seed(name: str, tmp_path: Path) -> None:
    """Whatever was drawn before; and a resumed run goes on with the same."""
    theta = []
    for part in ("first", "second"):
        torch.rand(7), np.random.rand(3)
        config = federation(tmp_path / part, name)
        theta.append(load_file(stored(tmp_path / part) / "personal_model.safetensors"))
    assert all(torch.equal(theta[0][key], theta[1][key]) for key in theta[0])
    half = federation(tmp_path / "half", name, rounds=2)
    instance_of.__globals__["_own"].__dict__.clear()  # as in a new process
    torch.rand(5)
    on = half.with_overrides({"rounds": 3, "resume-from": half.run.output_dir})
    run_tiny(on, num_clients=2)
    whole = load_file(stored(tmp_path / "half") / "personal_model.safetensors")
    assert all(torch.equal(whole[key], theta[0][key]) for key in whole)
    assert rows(config)[-1]["accuracy_micro"] == rows(on)[-1]["accuracy_micro"]


def test_one_object_for_everybody_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_object.cache_clear()
    with pytest.raises((RunError, MHpFedHNError)):
        federation(tmp_path, "one_object", global_model=f"{HERE}:one_object", method="mh-pfedhn-gd")
    assert "returned the same parameters as in an earlier call" in caplog.text
    assert "no lru_cache" in caplog.text


def test_building_leaves_the_callers_randomness_alone() -> None:
    kind = ModelKind(f"{HERE}:drawn_by_numpy", 1, 4, CPU, input_shape=(1, 8, 8))
    torch.manual_seed(3), np.random.seed(3)
    wanted = torch.rand(1), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    assert not torch.equal(draw_theta(kind, 1), draw_theta(kind, 2))
    assert torch.equal(built(kind, 1)[1].weight, built(kind, 1)[1].weight)  # type: ignore[index]
    assert (torch.rand(1), np.random.rand()) == wanted


def test_a_last_batch_of_one_harms_nobody(tmp_path: Path) -> None:
    """17 training examples in batches of 16, and a layer that wants two."""
    config = federation(
        tmp_path, "batch_norm_1d", max_client_examples=23, test_fraction=0.26, batch_size=16
    )
    assert {row["num_train"] for row in client_rows(config)} == {"17"}
    assert [row["num_accepted"] for row in rows(config)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("max_norm_by_data", "MaxNorm has replaced the tensor of out.weight"),
        ("returns_dict", "Returns returns a dict; expected one tensor"),
        ("random_features_not_stored", "plain weights lack w"),
    ],
)
def test_they_are_found_before_anybody_joins(name: str, says: str, tmp_path: Path) -> None:
    own = trusting(tmp_path, f"{HERE}:{name}") | {"image-size": 8}
    good, text = checked(settings(tmp_path, **own))
    assert good == (name == "random_features_not_stored")
    assert says in " ".join(text.split())
