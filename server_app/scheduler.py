"""Who trains when: two numbers, one mechanism.

`max_in_flight` (F) slots; an update holds its slot from the moment its message is sent until the
server step that used it. `buffer_size` (M) accepted updates make one server step. So

- (1, 1) is the published sequential algorithm: a client waits for the one before it;
- (m, m) is a synchronous cohort: m clients share one phi, one step, next cohort;
- (N, N) is fully parallel: one step a round;
- (N, m) is buffered asynchronous: a step for every m arrivals; the round still ends with its last.

A round is one pass over the participants, or over those drawn for it (`sample`). Who holds up
others is passed over, that is, gives up its slot, when it was asked `round-deadline-s` ago, or when
`close-fraction` of the slots have answered: then a step is taken with what is there, and the next
are asked. A round closes when nobody is left to ask or to wait for, and the minimum fraction has
answered; with everybody in flight that is its deadline. What arrives after that is late, and used
in a later round. A reply is used while its staleness (server steps since its message was made) is
at most `max-staleness`; in its own round the F / M steps that the schedule itself makes meanwhile
are always allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from common.config import RunSection, ScheduleSection
from common.files import best_round
from common.log import logger
from common.messages import MOST_WEIGHT, bounded_counts
from server_app.clients import Client
from server_app.transport import Arrival, Outgoing, Transport

MOST_SHORT_ROUNDS = 9
"""In a row, of the few that `clients-per-round` draws, below `min-fraction`: chance, or a liar."""
U = TypeVar("U")
"""What a good reply brings."""


def sample(
    present: Sequence[Client],
    section: ScheduleSection,
    asked: Mapping[str, int],
    rng: np.random.Generator,
) -> list[Client]:
    """Draw who trains in a round, `clients-per-round` of those present, in the order of training.

    By `client-sampling`: "uniform", without replacement; "examples", by exponential clocks whose
    rates are the numbers of examples, none above three medians; "round-robin", those who were asked
    longest ago (`asked`: the last round of each, by client_id).
    """
    order = rng.permutation(len(present))
    wanted = section.clients_per_round or len(present)
    count = math.ceil(wanted * len(present)) if wanted < 1 else min(int(wanted), len(present))
    if count < len(present) and section.client_sampling == "examples":
        rates = bounded_counts([present[i].num_examples for i in order], MOST_WEIGHT)
        order = order[np.argsort(rng.exponential(size=len(order)) / rates)]
    elif count < len(present) and section.client_sampling == "round-robin":
        last = [asked.get(present[i].client_id, 0) for i in order]
        order = order[np.argsort(last, kind="stable")]
    return [present[i] for i in order[:count]]


def last_round(run: RunSection, rows: Sequence[Mapping[str, Any]]) -> int:
    """Return which round is the last of a run, after these rows of metrics.jsonl.

    `rounds`, or the next one where validation was best `patience` rounds ago: the last round tests
    everybody, and waits for all who are still at it. No single participant's claim decides.
    """
    best, now = best_round(rows, "validation_midmean"), rows[-1]["round"]
    if not run.patience or best is None or now - best["round"] < run.patience:
        return run.rounds
    words = "Validation is best in round %d, %d rounds ago (patience = %d); round %d is the last"
    last = min(run.rounds, int(now) + 1)
    logger.info(words, best["round"], now - best["round"], run.patience, last)
    return last


class RoundActions(Protocol[U]):
    """What the schedule asks of a method."""

    @property
    def num_steps(self) -> int:
        """Count the server steps taken so far."""

    def messages(self, client_ids: Sequence[str]) -> Iterator[Outgoing]:
        """Make the messages to these clients, each with what the server knows when it is asked."""

    def accept(self, arrival: Arrival) -> U | None:
        """Turn a good reply into an update; None when it is rejected (and logged, counted)."""

    def step(self, updates: Sequence[U]) -> None:
        """Take one server step."""


@dataclass
class RoundOutcome:
    """What happened to the participants of one round, in client ids and counts.

    `too_stale` counts good replies of this round or earlier ones that were too old to be used.
    """

    accepted: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    skipped_busy: list[str] = field(default_factory=list)
    late_used: int = 0
    late_dropped: int = 0
    too_stale: int = 0
    num_steps: int = 0

    def counts(self) -> dict[str, float]:
        """Return how many of each there were, as columns of metrics.jsonl."""
        return {
            "num_accepted": len(self.accepted),
            "num_failed": len(self.failed),
            "num_unanswered": len(self.unanswered) + len(self.skipped_busy),
            "num_late_used": self.late_used,
            "num_late_dropped": self.late_dropped,
            "num_too_stale": self.too_stale,
            "num_server_steps": self.num_steps,
        }


class Schedule:
    """Runs rounds over a transport; messages of stragglers stay in flight from round to round."""

    def __init__(self, section: ScheduleSection, transport: Transport) -> None:
        self._section = section
        self._transport = transport

    def slots(self, num_participants: int) -> tuple[int, int]:
        """Resolve (max_in_flight, buffer_size) for this many participants; 0 means all."""
        in_flight = min(self._section.max_in_flight or num_participants, num_participants)
        return in_flight, min(self._section.buffer_size or in_flight, in_flight)

    def run_round(
        self,
        server_round: int,
        participants: Sequence[tuple[str, int]],
        actions: RoundActions[U],
        *,
        last: bool = False,
    ) -> RoundOutcome:
        """Train every participant once: (client_id, node_id) pairs in the order of training.

        In the `last` round `close-fraction` does not apply, for whoever is left behind now would
        miss the final model.
        """
        state = _RoundState[U](server_round, list(participants), self.slots(len(participants)))
        state.enough = 1.0 if last else self._section.close_fraction
        state.asked = dict.fromkeys((c for c, _ in participants), self._now())
        while not self._closed(state):
            self._dispatch(state, actions)
            for arrival in self._transport.poll():
                self._receive(state, arrival, actions)
                if len(state.buffer) >= state.buffer_size:
                    self._step(state, actions)
            self._pass_over(state, actions)
        self._transport.drop_unsent()
        if state.buffer:
            self._step(state, actions)
        state.outcome.skipped_busy = [client_id for client_id, _ in state.queue]
        state.outcome.unanswered = sorted(state.pending | state.passed_over)
        return state.outcome

    def _closed(self, state: _RoundState[U]) -> bool:
        """Say whether nobody is left to ask or to wait for."""
        ready = bool(self._ready(state))
        if not (state.pending or state.passed_over or state.queue):
            return True
        if not (state.pending or ready or len(self._transport)):
            return True  # those in the queue are not free, and nothing will free them
        accepted = len(state.outcome.accepted) / state.num_participants
        done = accepted + len(state.outcome.failed) / state.num_participants
        least = 0.0 if self._section.clients_per_round else self._section.min_fraction
        if ready or accepted < least:
            return False
        if state.enough < 1 and done >= state.enough:
            return True
        waited_for = state.pending | state.passed_over | {c for c, _ in state.queue}
        return self._overdue(state, waited_for) == waited_for

    def _overdue(self, state: _RoundState[U], client_ids: set[str]) -> set[str]:
        """Return those of these clients that were asked `round-deadline-s` ago."""
        patience = self._section.round_deadline_s or math.inf
        now = self._now()
        return {c for c in client_ids if now - state.asked[c] >= patience}

    def _pass_over(self, state: _RoundState[U], actions: RoundActions[U]) -> None:
        """Take their slots from clients that hold up others; step with what is there then."""
        if self._free(state) and self._ready(state):
            return
        slow = self._overdue(state, state.pending)
        fraction = self._section.close_fraction if state.queue else state.enough
        in_slots = len(state.pending) + len(state.buffer)
        if fraction < 1 and len(state.buffer) >= fraction * in_slots:
            slow = set(state.pending)
        state.pending -= slow
        state.passed_over |= slow
        if slow and state.buffer and not state.pending:
            self._step(state, actions)

    def _now(self) -> float:
        return self._transport.clock.monotonic()

    def _free(self, state: _RoundState[U]) -> int:
        return max(0, state.max_in_flight - len(state.pending) - len(state.buffer))

    def _ready(self, state: _RoundState[U]) -> list[tuple[str, int]]:
        busy = self._transport.busy_nodes()
        return [pair for pair in state.queue if pair[1] not in busy]

    def _dispatch(self, state: _RoundState[U], actions: RoundActions[U]) -> None:
        chosen = self._ready(state)[: self._free(state)]
        if not chosen:
            return
        leaving = {client_id for client_id, _ in chosen}
        state.queue = [pair for pair in state.queue if pair[0] not in leaving]
        state.pending |= leaving
        state.asked |= dict.fromkeys(leaving, self._now())
        messages = actions.messages([client_id for client_id, _ in chosen])
        # Without a step in between, a message may as well be made when the grid has use for it.
        # An asynchronous buffer steps while others train: there theta is that of the dispatch.
        self._transport.send(messages if state.synchronous else list(messages))

    def _receive(self, state: _RoundState[U], arrival: Arrival, actions: RoundActions[U]) -> None:
        client_id = arrival.pending.client_id
        on_time = arrival.pending.header.server_round == state.number
        fresh = self._is_fresh(state, arrival, actions.num_steps - arrival.pending.version)
        update = actions.accept(arrival) if fresh else None
        if on_time:
            state.pending.discard(client_id)
            state.passed_over.discard(client_id)
            (state.outcome.accepted if update else state.outcome.failed).append(client_id)
        elif update:
            state.outcome.late_used += 1
        else:
            state.outcome.late_dropped += 1
        if update:
            state.buffer.append(update)

    def _is_fresh(self, state: _RoundState[U], arrival: Arrival, staleness: int) -> bool:
        """Say whether a reply is young enough; one that failed is, for its failure to be told."""
        bound = self._section.max_staleness
        if arrival.pending.header.server_round == state.number:
            bound = max(bound, -(-state.max_in_flight // state.buffer_size))
        if arrival.content is None or staleness <= bound:
            return True
        state.outcome.too_stale += 1
        logger.warning(
            "Not used: the %s is %d server steps old; max-staleness allows %d",
            arrival.pending.source,
            staleness,
            bound,
        )
        return False

    def _step(self, state: _RoundState[U], actions: RoundActions[U]) -> None:
        updates, state.buffer = state.buffer, []
        actions.step(updates)
        state.outcome.num_steps += 1


class _RoundState(Generic[U]):
    """The moving parts of one round.

    `pending` hold slots, `passed_over` do not any more. `asked` has the clock's seconds, the start
    of the round for those who have not been asked yet.
    """

    def __init__(self, number: int, queue: list[tuple[str, int]], slots: tuple[int, int]) -> None:
        self.number = number
        self.queue = queue
        self.num_participants = len(queue)
        self.enough = 1.0
        self.max_in_flight, self.buffer_size = slots
        self.synchronous = self.buffer_size == self.max_in_flight
        self.pending: set[str] = set()
        self.passed_over: set[str] = set()
        self.asked: dict[str, float] = {}
        self.buffer: list[U] = []
        self.outcome = RoundOutcome()
