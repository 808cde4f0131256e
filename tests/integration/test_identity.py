"""An embedding belongs to a client: it is found again by its owner, and by nobody else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.config import RunConfig
from common.errors import RunError
from experiments.run.engines.inprocess import simulated_nodes
from server_app.admission import fingerprint
from tests.integration.conftest import Lines
from tests.support.attendance import attended_by
from tests.support.outputs import checkpoints, rows
from tests.support.tiny import HERE, MIXED, run_tiny, tiny_config, trusting

EVERYBODY = range(6)
KEYS = {i: f"key {i}".encode() for i in EVERYBODY}


def named(*client_ids: str, folder: Path, models: str = MIXED) -> list[dict]:
    """Node configs of clients with a name; each has the partition of its place."""
    return [
        {
            "client-id": client_id,
            "partition-id": i,
            "num-partitions": 6,
            "state-dir": str(folder / "state"),
            **trusting(folder, models),
        }
        for i, client_id in enumerate(client_ids)
    ]


def config_at(folder: Path, **overrides: object) -> RunConfig:
    settings: dict[str, object] = {
        "rounds": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 20,
        "max_in_flight": 0,
        "buffer_size": 0,
        **overrides,
    }
    return tiny_config(folder, **settings)


def resumed(config: RunConfig, **overrides: object) -> RunConfig:
    changed = {key.replace("_", "-"): value for key, value in overrides.items()}
    return config.with_overrides({"resume-from": config.run.output_dir, **changed})


def tensors_after(config: RunConfig, server_round: int) -> dict[str, torch.Tensor]:
    for path in checkpoints(config):
        done = json.loads((path / "meta.json").read_text())["rows"]
        if done[-1]["round"] == server_round:
            return load_file(path / "tensors.safetensors")
    raise AssertionError(f"no checkpoint of round {server_round}")


def accepted(config: RunConfig) -> list[int]:
    return [row["num_accepted"] for row in rows(config)]


def test_a_site_that_stays_away_for_five_rounds_keeps_its_embedding(
    tmp_path: Path, logged: Lines
) -> None:
    """It comes back as another node: a SuperNode without a key gets a new id at every start."""
    nodes = [*simulated_nodes(6), {"partition-id": 3, "num-partitions": 6}]
    config = config_at(tmp_path, rounds=9, state_dir=str(tmp_path / "state"))

    def plan(server_round: int) -> list[int]:
        away = [i for i in EVERYBODY if i != 3]
        return list(EVERYBODY) if server_round <= 2 else away + [6] * (server_round >= 8)

    run_tiny(config, node_configs=nodes, grid_type=attended_by(plan))
    assert accepted(config) == [6, 6, 5, 5, 5, 5, 5, 6, 6]  # lost: five client-rounds
    mine = [tensors_after(config, r)["embeddings.3"] for r in (2, 7, 8)]
    assert torch.equal(mine[0], mine[1])
    assert not torch.equal(mine[1], mine[2])
    moments = [tensors_after(config, r)["adam.step.embeddings.3"].item() for r in (2, 7, 9)]
    assert moments == [2, 2, 4]  # its optimiser state was waiting, too
    assert logged.find("Client 3 is back, on node 8")


def test_server_and_nodes_restart_and_find_each_other(tmp_path: Path, logged: Lines) -> None:
    """Same keys, other order of nodes: nobody gets the embedding of another."""
    config = config_at(tmp_path)
    names = [f"site-{i}" for i in EVERYBODY]
    run_tiny(
        config,
        node_configs=named(*names, folder=tmp_path),
        grid_type=attended_by(lambda _: EVERYBODY, KEYS),
    )
    order = [4, 2, 0, 5, 1, 3]
    nodes = named(*names, folder=tmp_path)
    run_tiny(
        resumed(config, rounds=3),
        node_configs=[nodes[i] for i in order],
        grid_type=attended_by(
            lambda _: EVERYBODY, {place: KEYS[i] for place, i in enumerate(order)}
        ),
    )
    assert accepted(config) == [6, 6, 6]
    assert not logged.find("Refused")
    after = tensors_after(config, 3)
    assert sorted(k for k in after if k.startswith("embeddings.")) == [
        f"embeddings.site-{i}" for i in EVERYBODY
    ]
    assert {after[f"adam.step.embeddings.site-{i}"].item() for i in EVERYBODY} == {3.0}


def test_somebody_elses_key_is_refused_after_a_restart_of_both(
    tmp_path: Path, logged: Lines
) -> None:
    config = config_at(tmp_path)
    names = [f"site-{i}" for i in EVERYBODY]
    nodes = named(*names, folder=tmp_path)
    run_tiny(config, node_configs=nodes, grid_type=attended_by(lambda _: EVERYBODY, KEYS))
    stolen = KEYS | {2: b"another key"}
    run_tiny(
        resumed(config, rounds=4),
        node_configs=nodes,
        grid_type=attended_by(lambda _: EVERYBODY, stolen),
    )
    assert accepted(config) == [6, 6, 5, 5]
    [said] = logged.find("Refused: ")
    assert said.startswith(
        f"Refused: client site-2 (node 4) presents key {fingerprint(b'another key')}, but this "
        f"client-id belongs to the key that first used it, {fingerprint(KEYS[2])}."
    )
    before, after = tensors_after(config, 2), tensors_after(config, 4)
    assert torch.equal(before["embeddings.site-2"], after["embeddings.site-2"])
    assert not torch.equal(before["embeddings.site-1"], after["embeddings.site-1"])


def test_one_key_is_one_participant(tmp_path: Path, logged: Lines) -> None:
    config = config_at(tmp_path, rounds=1)
    nodes = named("a", "b", folder=tmp_path)
    run_tiny(
        config, node_configs=nodes, grid_type=attended_by(lambda _: (0, 1), {0: b"k", 1: b"k"})
    )
    assert accepted(config) == [1]
    [said] = logged.find("Refused: client b (node 3) presents key")
    assert "which belongs to client a. One key is one participant" in said


def test_a_twin_is_let_in_when_the_first_has_left(tmp_path: Path, logged: Lines) -> None:
    """After kill -9 a node without a key returns under a new id while the old one seems online."""
    config = config_at(tmp_path, rounds=4)
    nodes = named("a", "b", "b", folder=tmp_path)
    nodes[2]["partition-id"] = 1  # the same model, so that it finds the same embedding
    plan = attended_by(lambda r: (0, 1) if r == 1 else (0, 1, 2) if r == 2 else (0, 2))
    run_tiny(config, node_configs=nodes, grid_type=plan)
    assert accepted(config) == [2, 2, 2, 2]
    assert len(logged.find("Refused: client b (node 4) claims a client-id that node 3 holds")) == 1
    assert tensors_after(config, 4)["adam.step.embeddings.b"].item() == 4


def test_nobody_is_the_global_model(tmp_path: Path) -> None:
    config = config_at(tmp_path, method="mh-pfedhn-gd")
    with pytest.raises(RunError, match="calls itself '__global__': a client-id has printable"):
        run_tiny(config, node_configs=named("__global__", folder=tmp_path))


def test_nobody_takes_the_common_model_of_another(tmp_path: Path, logged: Lines) -> None:
    models = f"{HERE}:small,{HERE}:wide"  # not of the common model's size
    config = config_at(
        tmp_path, method="mh-pfedhn-pg", rounds=2, validation_fraction=0.1, models=models
    )
    nodes = named("a", "__global__/a", folder=tmp_path, models=models)
    run_tiny(config, node_configs=[{**node, "state-dir": ""} for node in nodes])
    assert accepted(config) == [1, 1]
    assert logged.find("Refused: node 3 calls itself '__global__/a'")
    assert rows(config)[-1]["num_failed"] == 0


def test_ignoring_keys_once_binds_anew(tmp_path: Path) -> None:
    config = config_at(tmp_path, rounds=1)
    nodes = named("a", folder=tmp_path)
    old, new = (attended_by(lambda _: (0,), {0: key}) for key in (b"old", b"new"))
    run_tiny(config, node_configs=nodes, grid_type=old)
    run_tiny(resumed(config, rounds=2, client_keys="ignore"), node_configs=nodes, grid_type=new)
    run_tiny(resumed(config, rounds=3), node_configs=nodes, grid_type=new)
    assert accepted(config) == [1, 1, 1]
    assert tensors_after(config, 3)["adam.step.embeddings.a"].item() == 3
    with pytest.raises(RunError, match=r"0 clients are here.*belongs to the key that first used"):
        run_tiny(resumed(config, rounds=4), node_configs=nodes, grid_type=old)
