"""A run whose deltas are shortened on their way up."""

from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from tests.support.outputs import rows
from tests.support.tiny import HERE, run_tiny, tiny_config


def test_a_tenth_goes_up_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """Each client has two deltas, each with a memory; two clients, storing models takes long."""
    settings = {
        "method": "mh-pfedhn-gd", "models": f"{HERE}:small,{HERE}:wide", "num_partitions": 2,
        "rounds": 3, "checkpoint_every": 1, "keep_checkpoints": 9, "wire_precision": "bfloat16",
    }  # fmt: skip
    dense = tiny_config(tmp_path / "dense", **{**settings, "rounds": 1})
    run_tiny(dense, num_clients=2)
    settings["uplink_top_k"] = 0.1
    whole = tiny_config(tmp_path / "a", state_dir=str(tmp_path / "a/state"), **settings)
    run_tiny(whole, num_clients=2)
    broken = whole.with_overrides(
        {"resume-from": whole.run.output_dir, "output-dir": str(tmp_path / "b")}
    )
    (tmp_path / "a/run/checkpoint/checkpoint-00000003/manifest.json").unlink()
    run_tiny(broken, num_clients=2)  # round 3 again
    assert len(rows(whole)) == 3
    assert rows(whole) == rows(broken)
    first, full = rows(whole)[0], rows(dense)[0]
    assert first["bytes_down"] == full["bytes_down"]
    headers = 128 * 4  # numpy's, of as many deltas; there are as many arrays of places again
    assert first["bytes_up"] - 2 * headers < 0.2 * (full["bytes_up"] - headers)


def test_baselines_say_that_they_send_everything() -> None:
    with pytest.raises(ConfigError, match="method = 'fedavg' sends its arrays whole"):
        RunConfig.parse({"method": "fedavg", "uplink-top-k": 0.1})
