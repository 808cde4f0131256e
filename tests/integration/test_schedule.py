"""The schedule over a real grid with real clients: slots, buffers, staleness, late replies."""

import json
import threading
import time
from pathlib import Path

import pytest
from flwr.app import Context, Message

from common.config import RunConfig
from tests.support.tiny import Handler, Wrapped, run_tiny, tiny_config

SLOW = 0


class Watch:
    """Counts clients in training at the same time; makes client SLOW sleep in training."""

    def __init__(self, slow_s: float = 0.0, everyone_s: float = 0.02) -> None:
        self.slow_s, self.everyone_s = slow_s, everyone_s
        self.now = self.most = 0
        self.busy: set[int] = set()
        self.order: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type != "train.personal":
            return handler(message, context)
        client = int(context.node_config["partition-id"])
        with self._lock:
            assert client not in self.busy, "two messages in flight to one node"
            self.busy.add(client)
            self.now += 1
            self.most = max(self.most, self.now)
            self.order.append(client)
        try:
            time.sleep(self.slow_s if client == SLOW else self.everyone_s)
            return handler(message, context)
        finally:
            with self._lock:
                self.busy.discard(client)
                self.now -= 1


def rows(config: RunConfig) -> list[dict]:
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("in_flight", "buffer", "most", "steps"),
    [(1, 1, 1, 6), (2, 2, 2, 3), (4, 4, 4, 2), (0, 0, 6, 1), (0, 2, 6, 3), (3, 1, 3, 6)],
)
def test_slots_and_buffer(
    tmp_path: Path, in_flight: int, buffer: int, most: int, steps: int
) -> None:
    config = tiny_config(tmp_path, rounds=2, max_in_flight=in_flight, buffer_size=buffer)
    watch = Watch(slow_s=0.02)
    run_tiny(config, app=Wrapped(watch), workers=6)
    assert watch.most <= most
    assert most == 1 or watch.most > 1
    for row in rows(config):
        assert row["num_server_steps"] == steps
        assert row["num_accepted"] == 6


def test_synchronous_schedules_have_no_staleness_and_asynchronous_ones_do(tmp_path: Path) -> None:
    for buffer, stale in ((0, False), (2, True)):
        config = tiny_config(tmp_path / str(buffer), rounds=1, max_in_flight=0, buffer_size=buffer)
        run_tiny(config, app=Wrapped(Watch(slow_s=0.1)), workers=6)
        row = rows(config)[0]
        assert (row["mean_staleness"] > 0) is stale
        assert row["max_staleness"] in ((1, 2) if stale else (0,))  # three steps of two


def test_every_client_trains_once_a_round_in_an_order_that_changes(tmp_path: Path) -> None:
    watch = Watch(slow_s=0.0, everyone_s=0.0)
    run_tiny(tiny_config(tmp_path, rounds=3), app=Wrapped(watch))
    passes = [watch.order[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert passes[0] != passes[1]


def test_a_late_reply_is_used_in_the_next_round(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=3, max_in_flight=0, buffer_size=1, round_deadline_s=0.4)
    run_tiny(config, app=Wrapped(Watch(slow_s=0.9)), workers=6)
    found = rows(config)
    assert found[0]["num_unanswered"] >= 1  # the slow one; on a crowded machine others too
    assert sum(row["num_late_used"] for row in found[1:]) >= 1


def test_a_reply_that_is_too_stale_is_dropped(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        rounds=3,
        max_in_flight=0,
        buffer_size=1,
        round_deadline_s=0.4,
        max_staleness=0,
    )
    run_tiny(config, app=Wrapped(Watch(slow_s=0.9)), workers=6)
    found = rows(config)
    assert sum(row["num_late_used"] for row in found) == 0
    assert sum(row["num_late_dropped"] for row in found) >= 1


def test_a_round_closes_when_enough_have_answered(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, rounds=3, max_in_flight=0, buffer_size=2, close_fraction=0.8, evaluation="fused"
    )
    watch = Watch(slow_s=1.5)
    run_tiny(config, app=Wrapped(watch), workers=6)
    first, second, third = rows(config)
    assert (first["num_accepted"], first["num_unanswered"]) == (5, 1)
    assert first["seconds_round"] < 1.5
    assert second["num_accepted"] == 5
    assert third["num_accepted"] == 6  # the last round waits, for everyone's final model
    assert (third["num_late_used"], third["num_evaluated"]) == (1, 6)


def test_a_cohort_goes_on_without_a_client_that_holds_it_up(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, rounds=2, max_in_flight=2, buffer_size=2, round_deadline_s=0.5, evaluation="fused"
    )
    watch = Watch(slow_s=4.0)
    run_tiny(config, app=Wrapped(watch), workers=6)
    first = rows(config)[0]
    assert first["num_accepted"] >= 4  # on a crowded machine others may be late as well
    assert first["num_unanswered"] >= 1
    assert first["seconds_round"] < 4.0
    assert first["num_server_steps"] >= 3
    assert sorted(set(watch.order)) == list(range(6))  # everybody was asked
