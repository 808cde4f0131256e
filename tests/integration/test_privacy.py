"""Private federations end to end: what is sent, spent and remembered; what the seed cannot tell."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from client_app.privacy import spent_from
from client_app.store import FolderState
from common.accounting import DELTA, Spent, epsilon
from common.config import NodeConfig, RunConfig
from common.errors import ConfigError, RunError
from common.messages import EVALUATE
from common.user_privacy import RELEASES
from experiments.run.engines.inprocess import InProcessGrid, run_inprocess, simulated_nodes
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config, trusting

SMALL = {"models": f"{HERE}:small,{HERE}:wide", "server_rule": "kernel"}
PRIVATE = {**SMALL, "dp_noise": 1.0, "measure_alone": True}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_no_loss_leaves_and_epsilon_does(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    def watch(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type.startswith("train"):
            sent.append(dict(reply.content["config"]))
        return reply

    config = tiny_config(tmp_path, method="mh-pfedhn-gd", **PRIVATE)
    run_tiny(config, app=Wrapped(watch), num_clients=2)
    rows = metrics(tmp_path / "run")
    assert all("train-loss" not in reply and reply["epsilon"] > 0 for reply in sent)
    assert 0 < rows[0]["epsilon_max"] < rows[1]["epsilon_max"] == max(r["epsilon"] for r in sent)


@pytest.mark.parametrize(
    ("method", "models"), [("mh-pfedhn", 2), ("mh-pfedhn-pg", 3), ("local", 1)]
)
def test_every_model_that_saw_the_examples_counts(tmp_path: Path, method: str, models: int) -> None:
    """Own, common and alone: each takes ceil(360 / 16) steps a round."""
    settings = {**PRIVATE, "method": method, "state_dir": str(tmp_path / "state")}
    config = tiny_config(tmp_path, validation_fraction=0.1, test_fraction=0.25, **settings)
    run_tiny(config, num_clients=1)
    (found,) = spent_from(FolderState(tmp_path / "state" / "0"))
    assert found == (1.0, 16 / 360, 2 * 23 * models)


def test_epsilon_outlives_a_restart_and_the_next_federation(tmp_path: Path) -> None:
    own = {"state-dir": str(tmp_path / "state"), **trusting(tmp_path)}
    nodes = [{"client-id": "a", "partition-id": 0, **own, "model": str(PRIVATE["models"])}]
    spent = []
    for name in ("one", "two"):
        config = tiny_config(tmp_path / name, **PRIVATE)
        run_tiny(config, node_configs=nodes)
        spent.append(metrics(tmp_path / name / "run")[-1]["epsilon_max"])
    assert spent[1] > spent[0]
    stored = json.loads((tmp_path / "state" / "a" / "personal_model.json").read_text())
    assert (stored["epsilon"], stored["delta"], stored["dp_noise"]) == (spent[1], 1e-5, 1.0)


def test_two_runs_with_one_seed_have_different_noise(tmp_path: Path) -> None:
    """The server knows the seed: what it could draw again, it could take away."""
    theta = []
    for name in ("one", "two"):
        run_tiny(tiny_config(tmp_path / name, rounds=1, **PRIVATE), num_clients=1)
        kept = (tmp_path / name / "run" / "personal-models" / "0").glob(
            "personal_model.safetensors"
        )
        theta.append(FolderState(next(kept).parent).load("personal_model"))
    assert not torch.equal(theta[0]["hidden.weight"], theta[1]["hidden.weight"])


def test_batched_clients_train_privately_one_by_one(tmp_path: Path) -> None:
    alike = {**PRIVATE, "models": f"{HERE}:small"}
    config = tiny_config(tmp_path, rounds=1, max_in_flight=2, buffer_size=2, **alike)
    grid = run_inprocess(config, simulated_nodes(2), batched_clients=2)
    assert grid.num_together == 0
    assert metrics(tmp_path / "run")[0]["epsilon_max"] > 0


def test_batchnorm_is_refused_at_the_door(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tmp_path, models=f"{HERE}:normed", dp_noise=1.0)
    with caplog.at_level(logging.WARNING), pytest.raises(RunError):
        run_tiny(config, num_clients=1)
    assert all(word in caplog.text for word in ("query.register", "BatchNorm (norm)", "GroupNorm"))


def test_a_participant_can_only_be_stricter() -> None:
    asked = RunConfig.parse({"dp-noise": 2.0}).client
    noises = {0.5: 2.0, 2.0: 2.0, 3.0: 3.0}
    for own, counts in noises.items():
        node = NodeConfig.parse({"partition-id": 0, "dp-noise": own, "dp-clip": 0.1})
        assert node.client_section(asked).dp_noise == counts
        assert node.client_section(asked).dp_clip == 0.1
    with pytest.raises(ConfigError, match="needs a state-dir"):
        NodeConfig.parse({"client-id": "a"}).client_section(asked)
    with pytest.raises(ConfigError, match="fedproto sends more"):
        RunConfig.parse({"method": "fedproto", "dp-noise": 1.0})


def test_user_level_privacy_is_a_column(tmp_path: Path) -> None:
    run_tiny(tiny_config(tmp_path, user_dp_noise=2.0, max_in_flight=0, buffer_size=0, **SMALL))
    spent = [row["user_epsilon"] for row in metrics(tmp_path / "run")]
    assert 0 < spent[0] < spent[1]


class Stopping(InProcessGrid):
    """A server that is stopped while the results of a round are tested."""

    at = 2

    def _deliver(self, message: Message) -> Message:
        asked = message.content["config"]
        last = message.metadata.dst_node_id == max(self.get_node_ids())
        if message.metadata.message_type == EVALUATE and last and asked["server-round"] == self.at:
            raise KeyboardInterrupt
        return super()._deliver(message)


def test_a_step_that_is_done_again_counts_twice(tmp_path: Path) -> None:
    """Who was tested in round 2 has seen two noised results of it."""
    settings = {**SMALL, "user_dp_noise": 1.0, "user_dp_clip": 1.0, "rounds": 2, "max_in_flight": 0}
    config = tiny_config(tmp_path, buffer_size=0, evaluate_every=1, **settings)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(config, grid_type=Stopping)
    resumed = {**settings, "resume_from": str(tmp_path / "run")}
    run_tiny(tiny_config(tmp_path, buffer_size=0, evaluate_every=1, **resumed))
    counted = json.loads((tmp_path / "run" / RELEASES).read_text())
    assert counted == dict.fromkeys("012345", 3)
    expected = epsilon([Spent(1.0, 1.0, 3)], DELTA)
    assert metrics(tmp_path / "run")[-1]["user_epsilon"] == pytest.approx(expected)
