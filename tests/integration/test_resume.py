"""Checkpoint and resume: nothing learned before the last checkpoint is lost, whatever happens."""

import json
import os
import resource
from pathlib import Path

import pytest
from flwr.app import Context, Message

from common.config import RunConfig
from common.errors import CheckpointError, ConfigError, RunError
from tests.integration.conftest import Lines
from tests.support.outputs import assert_same_run, checkpoints, rows
from tests.support.tiny import Handler, Wrapped, run_tiny, tiny_config

METHODS = pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mh-pfedhn", {"max_in_flight": 1, "buffer_size": 1}),
        ("mh-pfedhn-gd", {"max_in_flight": 3, "buffer_size": 3}),
        ("mh-pfedhn-gd", {"max_in_flight": 0, "buffer_size": 0, "gd_mode": "fused"}),
        (
            "mh-pfedhn-pg",
            {"validation_fraction": 0.1, "measure_alone": True, "server_rule": "kernel"},
        ),
    ],
)


def config_at(folder: Path, **overrides: object) -> RunConfig:
    settings: dict[str, object] = {
        "rounds": 5,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
        "state_dir": str(folder / "state"),
        **overrides,
    }
    return tiny_config(folder, **settings)


def in_place(config: RunConfig) -> RunConfig:
    """The same run, going on where its newest checkpoint is."""
    return config.with_overrides({"resume-from": config.run.output_dir})


def stopping(server_round: int, stop: object) -> Wrapped:
    """The real app; `stop` is called when client 3 is to train in a round."""

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        due = message.content["config"]["server-round"] == server_round
        trains = message.metadata.message_type == "train.personal"
        if due and trains and context.node_config["partition-id"] == 3:
            stop()
        return handler(message, context)

    return Wrapped(handle)


def interrupt() -> None:
    raise KeyboardInterrupt


@METHODS
def test_resumed_in_place_equals_uninterrupted(
    tmp_path: Path, method: str, settings: dict[str, object]
) -> None:
    whole = config_at(tmp_path / "whole", method=method, **settings)
    run_tiny(whole)
    broken = config_at(tmp_path / "broken", method=method, **settings)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(broken, app=stopping(4, interrupt))
    assert [row["round"] for row in rows(broken)] == [1, 2, 3]
    assert len(checkpoints(broken)) == 1  # after round 2: round 3 and the started one are repeated
    run_tiny(in_place(broken))
    assert_same_run(whole, broken)


@pytest.mark.parametrize("rule", ["kernel", "adam"])
def test_how_often_checkpoints_are_written_changes_no_bit(tmp_path: Path, rule: str) -> None:
    settings = {"server_rule": rule, "max_in_flight": 3, "buffer_size": 3, "rounds": 3}
    often = config_at(tmp_path / "often", **settings, checkpoint_every=1)
    rarely = config_at(tmp_path / "rarely", **settings, checkpoint_every=3)
    for config in (often, rarely):
        run_tiny(config)
    assert len(checkpoints(often)) > len(checkpoints(rarely))
    assert_same_run(often, rarely)


def test_a_checkpoint_cut_short_costs_the_rounds_since_the_one_before(
    tmp_path: Path, logged: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = config_at(tmp_path / "whole"), config_at(tmp_path / "broken")
    run_tiny(whole)
    run_tiny(broken)
    for path in checkpoints(broken)[1:]:
        file = path / "tensors.safetensors"
        os.truncate(file, file.stat().st_size // 2)
    run_tiny(in_place(broken))
    passed_over = [m for m in caplog.messages if "is damaged: tensors.safetensors" in m]
    assert len(passed_over) == 2
    assert logged.find("Resumed after round 2")
    assert_same_run(whole, broken)


def test_nothing_but_damaged_checkpoints_is_a_clear_error(tmp_path: Path) -> None:
    config = config_at(tmp_path, rounds=2)
    run_tiny(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (checkpoints(config)[0] / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*meta\.json has 2 bytes"):
        run_tiny(in_place(config))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_a_disk_that_fills_up_and_is_freed_again(tmp_path: Path, logged: Lines) -> None:
    """In round 3 the operating system refuses every write, as a full disk would."""
    config = config_at(tmp_path, checkpoint_every=1, state_dir="")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type == "train.personal":
            full = message.content["config"]["server-round"] == 3
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else soft, hard))
        return handler(message, context)

    try:
        run_tiny(config, app=Wrapped(handle))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (failure,) = logged.find("No checkpoint this time, the run goes on: cannot write a checkpoint")
    assert "File too large" in failure
    assert len(logged.find("Row 3 is not on disk, the run goes on")) == 1
    assert [row["round"] for row in rows(config)] == [1, 2, 3, 4, 5]
    assert len(checkpoints(config)) == 4  # and no temporary folder


def test_two_servers_on_one_folder(tmp_path: Path) -> None:
    config = config_at(tmp_path, rounds=2)
    refused: list[str] = []

    def second_server() -> None:
        with pytest.raises(RunError, match="another server is writing to") as caught:
            run_tiny(config)
        refused.append(str(caught.value))

    run_tiny(config, app=stopping(2, second_server))
    assert len(refused) == 1
    assert "give this one an output-dir of its own" in refused[0]
    assert [row["round"] for row in rows(config)] == [1, 2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = config_at(tmp_path, rounds=2)
    run_tiny(config)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        ConfigError, match=r"already holds a run\. To go on with it, set resume-from"
    ):
        run_tiny(config.with_overrides({"seed": 1}))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_another_method_does_not_resume(tmp_path: Path) -> None:
    config = config_at(tmp_path, rounds=2)
    run_tiny(config)
    with pytest.raises(CheckpointError, match="written by method mh-pfedhn; this run is mh-pfedhn"):
        run_tiny(in_place(config).with_overrides({"method": "mh-pfedhn-gd"}))


@pytest.mark.parametrize(
    ("lost", "says"), [({"state_dir": ""}, 1), ({"measure_alone": False}, 1), ({}, 0)]
)
def test_a_gain_over_models_that_start_anew_is_called_too_large(
    tmp_path: Path, logged: Lines, lost: dict[str, object], says: int
) -> None:
    before = config_at(tmp_path, rounds=1, **{"measure_alone": True, **lost})
    run_tiny(before)
    run_tiny(in_place(before).with_overrides({"rounds": 2, "measure-alone": True}))
    assert len(logged.find("Models trained alone start anew")) == says


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {"user_dp_noise": 1.0}), ({"user_dp_noise": 1.0}, {"user_dp_noise": 9.0}),
     ({"user_dp_noise": 1.0}, {"user_dp_noise": 1.0, "user_dp_clip": 0.1}),
     ({"user_dp_noise": 1.0}, {"user_dp_noise": 0.0})],
)  # fmt: skip
def test_what_was_released_does_not_become_private(
    tmp_path: Path, before: dict[str, float], after: dict[str, float]
) -> None:
    """Raw updates stay in what is shared; past steps had the noise that they had."""
    run_tiny(config_at(tmp_path, rounds=1, server_rule="kernel", **before))
    config = in_place(config_at(tmp_path, rounds=2, server_rule="kernel", **after))
    with pytest.raises(CheckpointError, match=r"user-dp-noise = .*this run has .*as they were"):
        run_tiny(config)
