"""Gains over Local: paired with a run that trained alike, or not given at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.report.gain import gains_over_local
from experiments.report.groups import Stat, load_study
from experiments.report.runs import Run
from experiments.report.settings import local_command, local_settings
from experiments.run.presets import Preset, preset_names
from tests.unit.experiments.run_folders import write_seed

HALF, HIGH = (0.5,) * 4, (0.9,) * 4


def test_gain_over_local_is_paired_by_client_and_seed(tmp_path: Path) -> None:
    write_seed(tmp_path / "l1", method="local", seed=1, clients=(0.5, 0.5, 0.5, 0.5))
    write_seed(tmp_path / "l2", method="local", seed=2, clients=(0.2, 0.2, 0.2, 0.2))
    write_seed(tmp_path / "h1", seed=1, clients=(0.6, 0.6, 0.4, 0.6))  # +.1 +.1 -.1 +.1
    write_seed(tmp_path / "h2", seed=2, clients=(0.4, 0.4, 0.4, 0.4))  # +.2
    write_seed(tmp_path / "h3", seed=3)  # no Local run of this seed
    write_seed(tmp_path / "o", seed=1, method="fedavg", classes_per_client=5)  # other data
    (gain,), unmatched = gains_over_local(load_study([str(tmp_path)]))
    assert gain.group.method == "mh-pfedhn"
    assert [(run.label, run.run.seed, run.differs) for run in unmatched] == [
        ("MH-pFedHN", 3, {}), ("FedAvg", 1, {}),
    ]  # fmt: skip
    assert (gain.num_better, len(gain.clients)) == (7, 8)
    # seed means .05 and .2
    assert gain.mean == Stat(pytest.approx(0.125), pytest.approx(0.075), 2)
    assert gain.by_family["cnn"].mean == pytest.approx((0.1 + 0.2) / 2)
    assert gain.by_family["vgg8"].mean == pytest.approx((0.0 + 0.2) / 2)


def test_of_two_locals_the_one_with_the_same_local_training_is_taken(tmp_path: Path) -> None:
    """A grid over batch-size: a method that equals its own Local gains nothing."""
    for size, clients in ((16, HIGH), (64, HALF)):
        write_seed(tmp_path / f"l{size}", method="local", batch_size=size, clients=clients)
        write_seed(tmp_path / f"h{size}", batch_size=size, clients=clients)
    gains, unmatched = gains_over_local(load_study([str(tmp_path)]))
    assert unmatched == []
    assert sorted(gain.group.settings.get("batch-size", 16) for gain in gains) == [16, 64]
    assert [gain.mean.mean for gain in gains] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("rounds", 9), ("local-epochs", 2), ("batch-size", 8), ("learning-rate", 0.1),
     ("momentum", 0.0), ("weight-decay", 0.0), ("client-clip-norm", 1.0),
     ("training-precision", "bfloat16"), ("evaluation", "fused")],
)  # fmt: skip
def test_no_gain_over_a_local_that_trained_otherwise(
    tmp_path: Path, key: str, value: object
) -> None:
    write_seed(tmp_path / "l", method="local", clients=HIGH)
    write_seed(tmp_path / "h", clients=HALF, **{key.replace("-", "_"): value})
    gains, (run,) = gains_over_local(load_study([str(tmp_path)]))
    assert gains == []
    assert {k: own for k, (own, _) in run.differs.items()} == {key: value}


def test_without_a_local_run_a_run_is_compared_with_what_it_trained_alone(tmp_path: Path) -> None:
    write_seed(tmp_path / "h1", clients=HALF, alone=(0.3, 0.3, 0.5, 0.5))
    write_seed(tmp_path / "h2", seed=2, clients=HALF, alone=HIGH)
    write_seed(tmp_path / "l2", seed=2, method="local", clients=(0.4,) * 4)  # this one counts
    (gain,), unmatched = gains_over_local(load_study([str(tmp_path)]))
    assert unmatched == []
    assert gain.mean.mean == pytest.approx((0.1 + 0.1) / 2)
    assert (gain.num_better, len(gain.clients)) == (6, 8)


def test_rounds_between_evaluations_count_where_the_last_round_has_none() -> None:
    every = {n: local_settings({"rounds": 4, "evaluate-every": n}) for n in (1, 2, 3)}
    assert every[1] == every[2]
    assert every[3]["evaluate-every"] == 3


def test_the_page_names_what_differs_and_the_command_that_fits(tmp_path: Path) -> None:
    write_seed(tmp_path / "l", method="local", batch_size=16, learning_rate=0.1)
    write_seed(tmp_path / "l2", method="local", batch_size=16)
    for seed in (1, 2):
        write_seed(tmp_path / f"h{seed}", seed=seed, server_lr=0.5, run_name="quickstart")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "MH-pFedHN, seed 1: the nearest Local run has batch-size 16 instead of 64." in text
    assert "MH-pFedHN, seed 2: no Local run has the same data, models and seed." in text
    command = local_command(Run.load(tmp_path / "h1"))
    assert command in text
    assert "method=local" in command
    assert "--seed 1" in command
    assert "server-lr" not in command, "it says nothing about training alone"
    assert "What each client gains" in text
    assert "better →" not in text


@pytest.mark.parametrize("name", preset_names())
def test_local_runs_with_every_preset(name: str) -> None:
    """So the command that the page gives can be run."""
    config = Preset.load(name).with_settings(["method=local"]).config
    assert config.run.method == "local"
