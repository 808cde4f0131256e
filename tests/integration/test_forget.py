"""`mh-pfedhn forget`: nothing of a participant is left in a run, and the run goes on without it."""

import json
from pathlib import Path

import pytest
from filelock import FileLock

from common.config import RunConfig
from experiments.__main__ import main
from experiments.run.engines.inprocess import simulated_nodes
from server_app.output.checkpoint import load_checkpoint, save_checkpoint
from tests.support.outputs import client_rows, rows
from tests.support.tiny import HERE, run_tiny, tiny_config

Capture = pytest.CaptureFixture[str]


def finished(folder: Path, **settings: object) -> RunConfig:
    wanted = {"validation_fraction": 0.1, "keep_checkpoints": 3, "rounds": 2, **settings}
    config = tiny_config(folder, **wanted)
    run_tiny(config, num_clients=4)
    return config


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("mh-pfedhn", "adam"),
        ("mh-pfedhn-gd", "kernel"),
        ("mh-pfedhn-pg", "kernel"),
        ("lg-fedavg", "kernel"),
        ("fedavg", "kernel"),
    ],
)
def test_nothing_of_it_is_left_and_the_others_go_on(tmp_path: Path, method: str, rule: str) -> None:
    config = finished(tmp_path, method=method, server_rule=rule, models=f"{HERE}:small")
    folder = Path(config.run.output_dir)
    assert main(["forget", str(folder), "2"]) == 0
    (checkpoint,) = (folder / "checkpoint").glob("checkpoint-*")
    meta = (checkpoint / "meta.json").read_text()
    assert '"client_id": "2"' not in meta
    assert all(
        f'"{name}"' not in meta.partition('"rows"')[0] for name in ("2", "__global__/2")
    ) or method.startswith("lg")
    assert [row["client_id"] for row in client_rows(config)] == ["0", "1", "3"]
    assert not (folder / "personal-models" / "2").exists()
    attendance = json.loads((folder / "attendance.json").read_text())
    assert [row["client_id"] for row in attendance["participants"]] == ["0", "1", "3"]
    on = config.with_overrides({"rounds": 3, "resume-from": config.run.output_dir})
    others = [node for node in simulated_nodes(4) if node["partition-id"] != 2]
    run_tiny(on, node_configs=others)
    assert [row["num_accepted"] for row in rows(on)] == [4, 4, 3]


def test_a_model_that_was_of_nobody_else_goes_too(tmp_path: Path) -> None:
    """Of averaged models, who is alone in its group has it as it sent it."""
    config = finished(tmp_path, method="fedavg", models=f"{HERE}:small,{HERE}:wide", rounds=1,
                      num_partitions=4)  # fmt: skip
    folder = Path(config.run.output_dir)
    models = load_checkpoint(folder / "checkpoint").meta["learned"]["models"]
    assert len(models) == 2
    for client in ("2", "3"):
        assert main(["forget", str(folder), client]) == 0
    left = load_checkpoint(folder / "checkpoint")
    assert len(left.meta["learned"]["models"]) == 1
    assert len([name for name in left.tensors if name.startswith("model.")]) == 1


def test_a_participant_comes_with_another_key(tmp_path: Path, capsys: Capture) -> None:
    config = finished(tmp_path, rounds=1)
    place = Path(config.run.output_dir) / "checkpoint"
    checkpoint = load_checkpoint(place)
    for row in checkpoint.meta["registry"]:
        row["key"] = f"SHA256:{row['client_id']}"
    save_checkpoint(place, tensors=checkpoint.tensors, meta=checkpoint.meta, keep=1)
    assert main(["forget", config.run.output_dir, "2", "--key"]) == 0
    assert "2 belongs to the next key that comes" in capsys.readouterr().out
    after = load_checkpoint(place)
    keys = {row["client_id"]: row["key"] for row in after.meta["registry"]}
    assert keys == {"0": "SHA256:0", "1": "SHA256:1", "2": "", "3": "SHA256:3"}
    assert after.tensors.keys() == checkpoint.tensors.keys()
    assert after.meta["learned"] == checkpoint.meta["learned"], "it keeps what it has learned"


def test_a_name_that_names_no_folder_is_forgotten_too(tmp_path: Path, capsys: Capture) -> None:
    config = finished(tmp_path, rounds=1)
    place, odd = Path(config.run.output_dir) / "checkpoint", "we/ird [red]x"
    checkpoint = load_checkpoint(place)
    told = json.dumps(checkpoint.meta).replace('"client_id": "2"', f'"client_id": "{odd}"')
    meta = json.loads(told)
    save_checkpoint(place, tensors=checkpoint.tensors, meta=meta, keep=1)
    assert main(["forget", config.run.output_dir, odd]) == 0, capsys.readouterr().err


def test_what_cannot_be_forgotten_is_said(tmp_path: Path, capsys: Capture) -> None:
    config = finished(tmp_path, rounds=1)
    assert main(["forget", config.run.output_dir, "nobody"]) == 2
    assert "knows no 'nobody', only 0, 1, 2, 3" in capsys.readouterr().err
    with FileLock(Path(config.run.output_dir) / ".lock"):
        assert main(["forget", config.run.output_dir, "1"]) == 2
    assert "a server is writing to" in capsys.readouterr().err
