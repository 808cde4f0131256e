"""Clients that say nothing, come too late or leave: enough of them go on, too few stop the run."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Error, Message

from common.errors import RunError
from experiments.run.engines.inprocess import InProcessGrid
from tests.integration.conftest import Lines
from tests.integration.test_bad_input import BAD, SOURCE
from tests.integration.test_resume import config_at, in_place
from tests.support.attendance import attended_by
from tests.support.outputs import assert_same_run, rows, summary
from tests.support.tiny import HERE, run_tiny, tiny_config


@pytest.fixture(scope="module", autouse=True)
def warmed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import first what a client imports late: seconds that would count as its silence."""
    run_tiny(tiny_config(tmp_path_factory.mktemp("warm"), rounds=1))


class DeafGrid(InProcessGrid):
    """Never delivers training messages to one node."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id, message in list(self._queue.items()):
            training = message.metadata.message_type.startswith("train")
            if training and message.metadata.dst_node_id == BAD + 2:
                del self._queue[message_id]
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("in_flight", [1, 0])
def test_a_client_that_never_answers(tmp_path: Path, logged: Lines, in_flight: int) -> None:
    config = tiny_config(
        tmp_path, max_in_flight=in_flight, buffer_size=in_flight, message_timeout_s=3.0
    )
    run_tiny(config, grid_type=DeafGrid)
    lines = logged.find(SOURCE)
    assert lines[0] == SOURCE + "no answer within 3 s"
    assert summary(config)["status"] == "completed"
    assert [(r["num_accepted"], r["num_failed"]) for r in rows(config)] == [(5, 1), (5, 0)]


class DyingGrid(InProcessGrid):
    """Answers as Ray does once a worker process has died."""

    def _deliver(self, message: Message) -> Message:
        config = message.content["config"]
        if message.metadata.message_type == "train.personal" and config["server-round"] == 2:
            return Message(
                Error(0, "ActorDiedError: the actor died unexpectedly"), reply_to=message
            )
        return super()._deliver(message)


def test_a_dead_ray_worker_ends_the_run_and_saves_what_was_learned(
    tmp_path: Path, logged: Lines
) -> None:
    config = tiny_config(tmp_path, rounds=3, checkpoint_every=100)
    with pytest.raises(RunError, match=r"round 2: 0 of 6 clients sent a usable update"):
        run_tiny(config, grid_type=DyingGrid)
    assert "A Ray worker process died" in logged.find("Rejected")[0]
    found = summary(config)
    assert found["status"] == "failed"
    assert "resume with resume-from" in found["reason"]
    again = tiny_config(tmp_path, rounds=3, resume_from=config.run.output_dir)
    run_tiny(again)
    assert summary(again)["status"] == "completed"
    assert [row["round"] for row in rows(again)] == [1, 2, 3]


class SilentGrid(InProcessGrid):
    """Client BAD registers and then says nothing, whatever it is asked."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id, message in list(self._queue.items()):
            asked = message.metadata.message_type != "query.register"
            if asked and message.metadata.dst_node_id == BAD + 2:
                del self._queue[message_id]
        return super().pull_messages(message_ids)


def test_the_deadline_holds_in_every_phase(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        method="mh-pfedhn-gd",
        rounds=1,
        max_in_flight=0,
        buffer_size=0,
        round_deadline_s=2.0,
        message_timeout_s=600.0,
    )
    run_tiny(config, grid_type=SilentGrid)
    row = rows(config, timed=True)[0]
    assert (row["num_accepted"], row["num_evaluated"]) == (5, 5)
    assert row["seconds_round"] < config.schedule.message_timeout_s


EVERYBODY = range(6)


def test_too_few_are_left_between_rounds(tmp_path: Path) -> None:
    """Four of six are gone after round 2: what was learned waits for them, bit for bit."""
    settings = {"state_dir": "", "models": f"{HERE}:small,{HERE}:wide"}
    whole, left = (
        config_at(tmp_path / name, checkpoint_every=100, min_clients=4, **settings)
        for name in ("whole", "left")
    )
    with pytest.raises(RunError) as caught:
        run_tiny(left, grid_type=attended_by(lambda look: EVERYBODY if look <= 2 else (0, 3)))
    assert str(caught.value) == (
        "round 3: 2 clients are here, and no others came within 0 s; min-clients is 4. Away: "
        "1 (last here in round 2), 2 (last here in round 2), 4 (last here in round 2), "
        "5 (last here in round 2). Everything learned so far is in the checkpoint: start them "
        "again, or lower min-clients, then resume with resume-from."
    )
    found = summary(left)
    assert (found["status"], found["reason"]) == ("failed", f"RunError: {caught.value}")
    assert [row["num_accepted"] for row in rows(left)] == [6, 6]
    run_tiny(in_place(left))
    run_tiny(whole)
    assert_same_run(whole, left)
