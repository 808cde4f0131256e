"""`clients-per-round`: some of those present train in a round, drawn as `client-sampling` says."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import RunConfig, ScheduleSection
from common.errors import ConfigError
from experiments.run.engines.inprocess import InProcessGrid, run_inprocess, simulated_nodes
from server_app.clients import Client
from server_app.scheduler import sample
from tests.support.outputs import client_rows, rows, tensors
from tests.support.tiny import HERE, tiny_config

CLIENTS = [Client(f"c{i}", 10, 100 * (i == 7) + 100) for i in range(20)]


def drawn(per_round: float, how: str = "uniform", rounds: int = 400) -> list[list[str]]:
    """Return who is asked, round by round."""
    section = ScheduleSection.model_validate(
        {"clients-per-round": per_round, "client-sampling": how}
    )
    asked: dict[str, int] = {}
    found = []
    for number in range(1, rounds + 1):
        chosen = sample(CLIENTS, section, asked, np.random.default_rng(number))
        names = [client.client_id for client in chosen]
        asked |= dict.fromkeys(names, number)
        found.append(names)
    return found


@pytest.mark.parametrize(
    ("per_round", "count"), [(0, 20), (3, 3), (0.25, 5), (0.01, 1), (50, 20), (1, 1)]
)
def test_numbers_and_fractions(per_round: float, count: int) -> None:
    for how in ("uniform", "examples", "round-robin"):
        for names in drawn(per_round, how, rounds=5):
            assert len(names) == len(set(names)) == count


def test_uniform_is_even_and_examples_count() -> None:
    even = Counter(name for names in drawn(5) for name in names)
    assert set(even) == {c.client_id for c in CLIENTS}
    assert max(even.values()) - min(even.values()) < 60  # 100 each, standard deviation 9
    heavy = Counter(name for names in drawn(1, "examples") for name in names)
    assert heavy["c7"] / 400 == pytest.approx(2 / 21, abs=0.045)  # three standard deviations
    assert heavy["c7"] > 1.3 * heavy["c3"]


def test_round_robin_comes_to_everybody() -> None:
    found = drawn(5, "round-robin", rounds=40)
    for start in range(0, 40, 4):
        passed = [name for names in found[start : start + 4] for name in names]
        assert sorted(passed) == sorted(c.client_id for c in CLIENTS)
    assert found[0] != found[4], "not the same groups again and again"


def test_all_of_them_are_drawn_as_without_sampling() -> None:
    whole = [c.client_id for c in sample(CLIENTS, ScheduleSection(), {}, np.random.default_rng(3))]
    order = np.random.default_rng(3).permutation(20)
    assert whole == [CLIENTS[i].client_id for i in order]


def test_a_number_is_whole() -> None:
    with pytest.raises(ConfigError, match=r"clients-per-round = 2\.5 is neither"):
        RunConfig.parse({"clients-per-round": 2.5})


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd", "mh-pfedhn-pg", "fedavg", "fd"])
@pytest.mark.parametrize("slots", [(0, 0), (1, 1), (2, 1)])
def test_only_those_drawn_train(tmp_path: Path, method: str, slots: tuple[int, int]) -> None:
    settings = {"method": method, "models": f"{HERE}:small", "validation_fraction": 0.1}
    config = tiny_config(
        tmp_path, **settings, rounds=4, clients_per_round=2, client_sampling="round-robin",
        max_in_flight=slots[0], buffer_size=slots[1], evaluation="separate",
    )  # fmt: skip
    run_inprocess(config, simulated_nodes(6))
    found = rows(config)
    assert [row["num_accepted"] for row in found] == [2] * 4
    assert [row["num_evaluated"] for row in found] == [2, 2, 2, 6], "the last round tests all"
    assert len(client_rows(config)) == 6


def test_a_resumed_run_draws_whom_the_whole_one_draws(tmp_path: Path) -> None:
    settings = {"models": f"{HERE}:small", "clients_per_round": 2, "client_sampling": "round-robin"}

    def run(config: RunConfig) -> InProcessGrid:
        return run_inprocess(config, simulated_nodes(6), workers=1)

    whole = tiny_config(tmp_path / "whole", **settings, rounds=5)
    run(whole)
    half = tiny_config(tmp_path / "half", **settings, rounds=5)
    state = {"state-dir": str(tmp_path / "state")}
    stopped = half.with_overrides({**state, "output-dir": str(tmp_path / "first"), "rounds": 2})
    run(stopped)
    on = half.with_overrides({**state, "resume-from": str(tmp_path / "first")})
    run(on)
    assert [r["num_accepted"] for r in rows(on)] == [2] * 5
    first, second = tensors(whole), tensors(on)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
