"""Participants that are well-formed and lie: the honest lose nothing, whatever the schedule."""

from pathlib import Path
from typing import Any

import pytest

from experiments.attacks.liars import LIES, accuracy_of_honest
from experiments.run.presets import EngineSection, Preset
from tests.support.tiny import HERE, tiny_config

NUM_CLIENTS = 11
SCHEDULES: dict[str, dict[str, Any]] = {
    "all": {},
    "cohorts": {"max_in_flight": 4, "buffer_size": 4},
    "one by one": {"max_in_flight": 1, "buffer_size": 1},
    "pg": {"method": "mh-pfedhn-pg", "validation_fraction": 0.1},
    "gd": {"method": "mh-pfedhn-gd"},
    "gd fused": {"method": "mh-pfedhn-gd", "gd_mode": "fused"},
}


def federation(folder: Path, **overrides: Any) -> Preset:
    """Ten participants on patterns that all can tell, and one that may lie."""
    settings = {
        "server_rule": "kernel", "clip_to_median": 1.5, "rounds": 10, "models": f"{HERE}:small",
        "evaluate_every": 10, "num_partitions": NUM_CLIENTS, "max_in_flight": 0, "buffer_size": 0,
        **overrides,
    }  # fmt: skip
    engine = EngineSection(name="inprocess", num_clients=NUM_CLIENTS, workers=1)
    return Preset("liars", "", engine, tiny_config(folder, **settings)).with_config({})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_that_undoes_everybodys_training_moves_nothing(tmp_path: Path, schedule: str) -> None:
    preset = federation(tmp_path, **SCHEDULES[schedule])
    honest = accuracy_of_honest(preset, 1)
    assert honest > 0.7
    assert accuracy_of_honest(preset, 1, "flip-5") > honest - 0.04


@pytest.fixture(scope="module")
def without_liars(tmp_path_factory: pytest.TempPathFactory) -> float:
    return accuracy_of_honest(federation(tmp_path_factory.mktemp("honest")), 1)


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_costs_the_honest_much(tmp_path: Path, lie: str, without_liars: float) -> None:
    assert accuracy_of_honest(federation(tmp_path), 1, lie) > without_liars - 0.04


def test_without_the_clip_one_liar_ruins_all(tmp_path: Path, without_liars: float) -> None:
    preset = federation(tmp_path, clip_to_median=0.0)
    assert accuracy_of_honest(preset, 1, "flip-5") < without_liars - 0.2
