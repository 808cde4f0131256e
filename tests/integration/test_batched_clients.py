"""The in-process engine with clients trained in one batched call: the same federation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from client_app.methods import mhpfedhn
from common.config import RunConfig
from experiments.run.engines import together
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from tests.support.outputs import rows
from tests.support.tiny import HERE, tiny_config


def run(config: RunConfig, batched_clients: int) -> list[dict]:
    run_inprocess(config, simulated_nodes(6), batched_clients=batched_clients)
    return rows(config)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the cohorts that are trained from now on."""
    found: list[int] = []
    train_cohort = together.train_cohort

    def counted(module, members, section, **options):  # noqa: ANN001, ANN003, ANN202
        found.append(len(members))
        return train_cohort(module, members, section, **options)

    monkeypatch.setattr(together, "train_cohort", counted)
    return found


@pytest.mark.parametrize(
    ("evaluation", "rule"), [("separate", "adam"), ("fused", "adam"), ("fused", "kernel")]
)
def test_batched_clients_give_the_same_rounds(
    tmp_path: Path, evaluation: str, rule: str, sizes: list[int]
) -> None:
    settings = {
        "models": f"{HERE}:small,{HERE}:wide",
        "rounds": 3,
        "max_in_flight": 0,
        "buffer_size": 0,
        "evaluation": evaluation,
        "server_rule": rule,
    }
    alone = run(tiny_config(tmp_path / "a", **settings), 0)
    assert sizes == []
    batched = run(tiny_config(tmp_path / "b", **settings), 6)
    assert sizes == [3, 3] * 3
    assert len(alone) == len(batched) == 3
    for one, other in zip(alone, batched, strict=True):
        for key in ("accuracy_micro", "train_loss", "test_loss", "bytes_up", "bytes_down"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("method", "gd_mode", "calls"),
    [
        ("mh-pfedhn", "separate", [3, 3] * 2),
        ("mh-pfedhn-gd", "separate", [6, 3, 3] * 2),  # w_g of all six, then two architectures
        ("mh-pfedhn-gd", "fused", [6, 3, 3] * 2),
    ],
)
def test_dropout_and_distillation(
    tmp_path: Path, method: str, gd_mode: str, calls: list[int], sizes: list[int]
) -> None:
    settings = {
        "models": f"{HERE}:normed,{HERE}:small",
        "max_in_flight": 0,
        "buffer_size": 0,
        "method": method,
        "gd_mode": gd_mode,
    }
    alone = run(tiny_config(tmp_path / "a", **settings), 0)
    batched = run(tiny_config(tmp_path / "b", **settings), 6)
    assert sizes == calls
    for one, other in zip(alone, batched, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert other["num_accepted"] == 6


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("mh-pfedhn-pg", [6, 3, 3, 3, 3]),  # common models; own ones; those trained alone
        ("mh-pfedhn-gd", [6, 3, 3, 3, 3]),
        ("mh-pfedhn", [3, 3, 3, 3]),
    ],
)
def test_every_predictor_is_measured_as_one_by_one(
    tmp_path: Path,
    method: str,
    calls: list[int],
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def differs(own: Tensor, common: Tensor, labels: Tensor, *, most: float) -> float:
        """Return a weight that is not 0, and another for every client."""
        return most * float((own.softmax(1) - common.softmax(1)).abs().mean())

    monkeypatch.setattr(mhpfedhn, "teaching_weight", differs)
    settings = {
        "method": method,
        "distill_alpha": 1.0,
        "measure_alone": True,
        "validation_fraction": 0.1,
        "models": f"{HERE}:normed,{HERE}:small",
        "global_model": f"{HERE}:normed",
        "max_in_flight": 0,
        "buffer_size": 0,
        "rounds": 3,
        "evaluation": "fused",
        "server_rule": "kernel",
        "personal_gain": 1.0,  # common models that differ
    }
    alone = run(tiny_config(tmp_path / "a", **settings), 0)
    batched = run(tiny_config(tmp_path / "b", **settings), 6)
    assert sorted(sizes) == sorted(calls * 3)
    for one, other in zip(alone, batched, strict=True):
        assert one.keys() == other.keys()
        keys = [key for key in one if key.startswith(("accuracy_", "num_"))]
        for key in (*keys, "train_loss", "test_loss", "bytes_up"):
            # measured: 1e-6; somebody else's teacher moves the losses by 3e-5
            assert other[key] == pytest.approx(one[key], rel=5e-6, abs=5e-6), key


def test_a_model_of_its_own_kind_is_trained_with_the_common_ones(
    tmp_path: Path, sizes: list[int]
) -> None:
    """Five small clients and one of another architecture: nobody is left to go one by one."""
    models = ",".join([f"{HERE}:small"] * 5 + [f"{HERE}:wide"])
    settings = {"models": models, "validation_fraction": 0.1}
    config = tiny_config(
        tmp_path, method="mh-pfedhn-pg", max_in_flight=0, buffer_size=0, **settings
    )
    run(config, 6)
    assert sizes == [6, 5, 1] * 2


@pytest.mark.parametrize("loss", ["balanced", "1, 9, 2, 1"])
def test_clients_that_weigh_their_classes_are_batched(
    tmp_path: Path, loss: str, sizes: list[int]
) -> None:
    settings = {"models": f"{HERE}:small", "max_in_flight": 0, "buffer_size": 0}
    settings |= {"measure_alone": True, "partition": "dirichlet", "dirichlet_alpha": 2.0}
    plain = run(tiny_config(tmp_path / "p", **settings), 0)
    alone = run(tiny_config(tmp_path / "a", **settings, loss=loss), 0)
    batched = run(tiny_config(tmp_path / "b", **settings, loss=loss), 6)
    assert sizes == [6, 6] * 2
    for one, other, without in zip(alone, batched, plain, strict=True):
        assert one["train_loss"] != pytest.approx(without["train_loss"], rel=1e-3)
        for key in ("accuracy_micro", "accuracy_alone", "train_loss", "test_loss"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


def dimmed(batch: Tensor) -> Tensor:
    """Make pictures darker, each as much as chance has it."""
    return (batch * torch.rand(len(batch), 1, 1, 1)).to(batch.dtype)


@pytest.mark.parametrize(
    "recipe",
    [
        {"augmentation": f"{__name__}:dimmed"},
        {"local_patience": 1, "local_epochs": 3, "learning_rate": 0.3, "validation_fraction": 0.2},
    ],
)
def test_what_cannot_be_batched_is_trained_one_by_one(
    tmp_path: Path, recipe: dict[str, object], sizes: list[int]
) -> None:
    settings = {"models": f"{HERE}:small", "max_in_flight": 0, "buffer_size": 0}
    plain = run(tiny_config(tmp_path / "p", **settings), 0)
    alone = run(tiny_config(tmp_path / "a", **settings, **recipe), 0)
    batched = run(tiny_config(tmp_path / "b", **settings, **recipe), 6)
    assert sizes == []
    losses = [[row["train_loss"] for row in found] for found in (plain, alone, batched)]
    assert losses[1] == losses[2]
    assert losses[0] != losses[1]


def test_as_many_as_memory_holds(
    tmp_path: Path,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A device that has no memory for six gets three at a time, and every client is trained."""
    counted = together.train_cohort

    def small_device(module, members, section, **options):  # noqa: ANN001, ANN003, ANN202
        if len(members) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return counted(module, members, section, **options)

    settings = {"models": f"{HERE}:small", "max_in_flight": 0, "buffer_size": 0}
    alone = run(tiny_config(tmp_path / "a", **settings), 0)
    monkeypatch.setattr(together, "train_cohort", small_device)
    batched = run(tiny_config(tmp_path / "b", **settings), 6)
    assert sizes == [3, 3] * 2
    assert caplog.text.count("no memory for 6 clients in one batched call: from now on 3.") == 1
    for one, other in zip(alone, batched, strict=True):
        assert other["num_accepted"] == 6
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
