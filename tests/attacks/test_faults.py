"""A run that dies at any moment and is resumed ends with the bits of one that never did."""

import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from common.config import RunConfig
from experiments.run.engines.inprocess import InProcessGrid
from tests.integration.test_resume import config_at, in_place
from tests.support.outputs import assert_same_run, checkpoints, rows
from tests.support.tiny import run_tiny

KILLS = int(os.environ.get("MH_PFEDHN_KILLS", "5"))
"""Over all schedules; 60 take two minutes."""
PG = {"method": "mh-pfedhn-pg", "server_rule": "kernel", "validation_fraction": 0.1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "sequential": {**PG, "max_in_flight": 1, "buffer_size": 1, "measure_alone": True},
    "cohort": {**PG, "max_in_flight": 3, "buffer_size": 3},
    "buffered": {"server_rule": "kernel", "max_in_flight": 3, "buffer_size": 2},
    "gd": {"method": "mh-pfedhn-gd", "max_in_flight": 1, "buffer_size": 1},
    "gd fused": {"method": "mh-pfedhn-gd", "gd_mode": "fused"},
}


@pytest.fixture(scope="module", params=SCHEDULES)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, float]:
    """A run of each schedule that nothing interrupts, and how many seconds it took."""
    torch.set_num_threads(1)  # threads do not survive a fork
    settings = SCHEDULES[request.param] | {"checkpoint_every": 1}
    config = config_at(tmp_path_factory.mktemp("whole") / "run", **settings)
    began = time.monotonic()
    run_tiny(config)
    return config, time.monotonic() - began


def once_more(config: RunConfig, folder: Path) -> RunConfig:
    """Return the same run for another folder."""
    return config.model_copy(
        update={"run": config.run.model_copy(update={"output_dir": str(folder)})}
    )


class FailingGrid(InProcessGrid):
    """Loses its SuperLink while round 4 is on its way, after some of it was learned."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for reply in found:
            trained = reply.metadata.message_type == "train.personal" and reply.has_content()
            if trained and reply.content["config"]["server-round"] == 4:
                self.num_together += 1
                if self.num_together == 5:
                    raise ConnectionError("the SuperLink is gone")
        return found


def test_an_error_in_the_middle_of_a_round_leaves_whole_rounds(
    whole: tuple[RunConfig, float], tmp_path: Path
) -> None:
    broken = once_more(whole[0], tmp_path / "broken")
    with pytest.raises(ConnectionError):
        run_tiny(broken, grid_type=FailingGrid)
    assert [row["round"] for row in rows(broken)] == [1, 2, 3]
    run_tiny(in_place(broken))
    assert_same_run(whole[0], broken)


def killed(config: RunConfig, after_s: float) -> bool:
    """Run in a process of its own, going on where it was; kill -9 it, unless it ends before."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            run_tiny(in_place(config) if checkpoints_of(config) else config)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def checkpoints_of(config: RunConfig) -> list[Path]:
    return checkpoints(config) if (Path(config.run.output_dir) / "checkpoint").is_dir() else []


def test_kill_9_at_random_moments_changes_no_bit(
    whole: tuple[RunConfig, float], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config, took_s = whole
    draw, kills, tries = random.Random(request.node.name), 0, 0
    wanted = -(-KILLS // len(SCHEDULES))
    while kills < wanted:
        broken = once_more(config, tmp_path / f"broken-{tries}")
        tries += 1
        assert tries < 10 * wanted, "it ends before it can be killed"
        started = time.monotonic()
        while kills < wanted and killed(broken, draw.uniform(0.05, 0.8) * took_s):
            kills += 1
        if kills < wanted:  # it ended before: the first run had more to load
            took_s = min(took_s, time.monotonic() - started)
        killed(broken, 600)  # to its end
        assert_same_run(config, broken)
