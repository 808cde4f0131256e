"""The schedule over a real grid with real clients: slots, buffers, staleness, late replies."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from common.messages import TRAIN
from experiments.run.engines.inprocess import InProcessGrid
from tests.support.outputs import rows
from tests.support.tiny import run_tiny, tiny_config

SLOW = 2
"""Node id of client 0."""


class Watched(InProcessGrid):
    """Notes who trains when and how many wait for training at a time; no clock decides anything.

    Its node SLOW does not answer the training of round 1 before round 2 has begun, where `holds`.
    """

    holds = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        del self.workers  # the server sends as much as its schedule allows
        self.order: list[int] = []
        self.most = self.latest = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in (m for m in messages if m.metadata.message_type == TRAIN):
            node = message.metadata.dst_node_id
            assert node not in self._training(), "two messages in flight to one node"
            self.latest = max(self.latest, int(message.metadata.group_id.partition(",")[0]))
            self.order.append(node - SLOW)
        accepted = list(super().push_messages(messages))
        self.most = max(self.most, len(self._training()))
        return accepted

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([i for i in message_ids if not self._held(i)])

    def _training(self) -> list[int]:
        found = (m.metadata for m in self._queue.values())
        return [data.dst_node_id for data in found if data.message_type == TRAIN]

    def _held(self, message_id: str) -> bool:
        if message_id not in self._queue:
            return False
        data = self._queue[message_id].metadata
        first = data.message_type == TRAIN and data.group_id.startswith("1,")
        return self.holds and self.latest < 2 and first and data.dst_node_id == SLOW


class Holding(Watched):
    holds = True


@pytest.mark.parametrize(
    ("in_flight", "buffer", "most", "steps"),
    [(1, 1, 1, 6), (2, 2, 2, 3), (4, 4, 4, 2), (0, 0, 6, 1), (0, 2, 6, 3), (3, 1, 3, 6)],
)
def test_slots_and_buffer(
    tmp_path: Path, in_flight: int, buffer: int, most: int, steps: int
) -> None:
    config = tiny_config(tmp_path, rounds=2, max_in_flight=in_flight, buffer_size=buffer)
    grid = run_tiny(config, grid_type=Watched)
    assert grid.most == most
    for row in rows(config):
        assert row["num_server_steps"] == steps
        assert row["num_accepted"] == 6


def test_synchronous_schedules_have_no_staleness_and_asynchronous_ones_do(tmp_path: Path) -> None:
    for buffer, stale in ((0, False), (2, True)):
        config = tiny_config(tmp_path / str(buffer), rounds=1, max_in_flight=0, buffer_size=buffer)
        run_tiny(config, grid_type=Watched)
        row = rows(config)[0]
        assert (row["mean_staleness"] > 0) is stale
        assert row["max_staleness"] == (2 if stale else 0)  # three steps of two


def test_every_client_trains_once_a_round_in_an_order_that_changes(tmp_path: Path) -> None:
    grid = run_tiny(tiny_config(tmp_path, rounds=3), grid_type=Watched)
    passes = [grid.order[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("method", ["mh-pfedhn", "pfedhn"])
@pytest.mark.parametrize(("bound", "used"), [(20, 1), (0, 0)])
def test_a_late_reply_is_used_in_the_next_round_unless_it_is_too_stale(
    tmp_path: Path, method: str, bound: int, used: int
) -> None:
    config = tiny_config(
        tmp_path,
        method=method,
        models="tests.support.tiny:small",
        rounds=3,
        max_in_flight=0,
        buffer_size=2,
        max_staleness=bound,
        close_fraction=0.8,
        evaluation="fused",
    )
    run_tiny(config, grid_type=Holding)
    first, second, third = rows(config)
    assert (first["num_accepted"], first["num_unanswered"]) == (5, 1)
    assert (second["num_late_used"], second["num_late_dropped"]) == (used, 1 - used)
    assert second["num_too_stale"] == 1 - used
    assert (third["num_accepted"], third["num_evaluated"]) == (6, 6)
