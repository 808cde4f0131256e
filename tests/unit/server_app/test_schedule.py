"""The schedule alone, over a transport that answers when told to: who is waited for, how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from common.config import RunConfig, ScheduleSection
from common.errors import ConfigError
from common.messages import Pending
from common.records import Header
from server_app.scheduler import RoundOutcome, Schedule
from server_app.transport import Arrival, Outgoing, Transport

NEVER = 10**9
LIMIT = 3000
"""Polls after which a round counts as hung."""


@dataclass
class Box:
    """Answers each client after so many polls, of one second each; those in `failing` fail."""

    delay: Callable[[str], int]
    failing: frozenset[str] = frozenset()
    flying: dict[str, tuple[Pending, int]] = field(default_factory=dict)
    polls: int = 0
    most: int = 0

    @property
    def clock(self) -> Box:
        return self

    def monotonic(self) -> float:
        return float(self.polls)

    def __len__(self) -> int:
        return len(self.flying)

    def busy_nodes(self) -> set[int]:
        return {pending.node_id for pending, _ in self.flying.values()}

    def send(self, messages: Iterable[Outgoing]) -> None:
        for outgoing in messages:
            client_id = outgoing.pending.client_id
            assert client_id not in self.flying, "two messages in flight to one node"
            self.flying[client_id] = (outgoing.pending, self.polls + self.delay(client_id))
        self.most = max(self.most, len(self.flying))

    def drop_unsent(self) -> None:
        """Everything was sent."""

    def poll(self) -> list[Arrival]:
        self.polls += 1
        assert self.polls < LIMIT, f"the round hangs; in flight: {sorted(self.flying)}"
        due = [c for c, (_, when) in self.flying.items() if when <= self.polls]
        return [self._arrival(self.flying.pop(c)[0]) for c in due]

    def _arrival(self, pending: Pending) -> Arrival:
        failed = pending.client_id in self.failing
        return Arrival(pending, None if failed else cast(Any, {}), "broken" if failed else "")


@dataclass
class Actions:
    """Notes the ages of the updates of every step."""

    server_round: int = 1
    num_steps: int = 0
    steps: list[list[int]] = field(default_factory=list)

    def messages(self, client_ids: Sequence[str]) -> Iterator[Outgoing]:
        for client_id in client_ids:
            header = Header("fed", "mh-pfedhn", self.server_round, "n")
            pending = Pending(client_id, int(client_id), "train", header, self.num_steps)
            yield Outgoing(pending, cast(Any, {}))

    def accept(self, arrival: Arrival) -> int | None:
        # one more than the age, for 0 is no update
        return None if arrival.content is None else 1 + self.num_steps - arrival.pending.version

    def step(self, updates: Sequence[int]) -> None:
        self.num_steps += 1
        self.steps.append([update - 1 for update in updates])


def run(
    box: Box, num_clients: int, *, rounds: int = 1, last: bool = False, **section: Any
) -> tuple[list[RoundOutcome], Actions]:
    schedule = Schedule(ScheduleSection(**section), cast(Transport, box))
    actions, outcomes = Actions(), []
    for actions.server_round in range(1, rounds + 1):
        clients = [(str(i), i) for i in range(num_clients)]
        outcomes.append(schedule.run_round(actions.server_round, clients, actions, last=last))
    return outcomes, actions


def silent(client_id: str) -> int:
    return NEVER if client_id == "0" else 1


@pytest.mark.parametrize(
    ("in_flight", "buffer", "steps"),
    [(10, 10, [9, 10, 10, 10, 10]), (1, 1, [1] * 49), (10, 5, [5] * 9 + [4]), (0, 0, [49])],
)
def test_a_silent_client_holds_its_slot_until_the_deadline(
    in_flight: int, buffer: int, steps: list[int]
) -> None:
    box = Box(silent)
    (outcome,), actions = run(
        box, 50, max_in_flight=in_flight, buffer_size=buffer, round_deadline_s=30
    )
    assert (len(outcome.accepted), outcome.unanswered) == (49, ["0"])
    assert [len(step) for step in actions.steps] == steps
    assert box.polls >= 30


@pytest.mark.parametrize("last", [False, True])
def test_a_cohort_goes_on_without_a_tenth(last: bool) -> None:
    box = Box(lambda client_id: 200 if client_id == "0" else 1)
    (outcome,), actions = run(
        box, 50, last=last, max_in_flight=10, buffer_size=10, close_fraction=0.9
    )
    assert [len(step) for step in actions.steps][:5] == [9, 10, 10, 10, 10]
    # the last round waits in the end, for everyone's final model
    assert (len(outcome.accepted), outcome.unanswered) == ((50, []) if last else (49, ["0"]))
    assert (box.polls >= 200) is last


def test_without_patience_set_a_slow_client_is_waited_for() -> None:
    box = Box(lambda client_id: 300 if client_id == "0" else 1)
    (outcome,), actions = run(box, 20, max_in_flight=10, buffer_size=10)
    assert len(outcome.accepted) == 20
    assert [len(step) for step in actions.steps] == [10, 10]
    assert box.polls > 300


def test_no_more_than_asked_hold_slots_but_who_was_passed_over_is_not_counted() -> None:
    box = Box(lambda client_id: 50 if client_id == "0" else 1)
    outcomes, _ = run(
        box, 12, rounds=2, max_in_flight=4, buffer_size=4, close_fraction=0.5, min_fraction=0.5
    )
    assert box.most == 5  # four slots, and the one that was passed over
    assert sum(len(outcome.accepted) for outcome in outcomes) >= 20


def test_an_answer_of_its_own_round_is_bounded_too() -> None:
    box = Box(lambda client_id: 80 if client_id == "0" else 1)
    (outcome,), actions = run(box, 100, max_in_flight=10, buffer_size=1, max_staleness=20)
    assert max(age for step in actions.steps for age in step) <= 20
    assert (outcome.too_stale, outcome.failed, len(outcome.accepted)) == (1, ["0"], 99)
    # what the schedule itself makes is allowed, whatever the bound: 100 in flight, a step for each
    (outcome,), actions = run(Box(lambda _: 1), 100, max_in_flight=0, buffer_size=1)
    assert (outcome.too_stale, len(outcome.accepted)) == (0, 100)
    assert max(age for step in actions.steps for age in step) == 99


def test_a_failure_does_not_close_a_round_below_the_minimum() -> None:
    box = Box(lambda client_id: 1 if int(client_id) < 5 else 9, failing=frozenset("0"))
    (outcome,), _ = run(
        box, 10, max_in_flight=0, buffer_size=0, close_fraction=0.5, min_fraction=0.5
    )
    assert len(outcome.accepted) >= 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"close-fraction": 0.4}, "close-fraction = 0.4 .* min-fraction = 0.5"),
        (
            {"close-fraction": 0.9, "method": "mh-pfedhn"},
            "evaluation = 'separate' .* Set it to 'fused'",
        ),
        (
            {"close-fraction": 0.9, "method": "mh-pfedhn-gd"},
            "'separate' and gd-mode = 'separate' .* Set both to 'fused'",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig.parse(settings)
