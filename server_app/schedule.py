"""Who trains when: two numbers, one mechanism.

`max_in_flight` (F) slots; an update holds its slot from the moment its message is sent until the
server step that used it. `buffer_size` (M) accepted updates make one server step. So

- (1, 1) is the published sequential algorithm: a client waits for the one before it;
- (m, m) is a synchronous cohort: m clients share one phi, one step, next cohort;
- (N, N) is fully parallel: one step a round;
- (N, m) is buffered asynchronous: a step for every m arrivals, nobody waits for the slowest.

A round is one pass over the participants. It closes when all of them answered (or the fraction
that is enough, `close-fraction`), or when the deadline passed and the minimum fraction answered.
What arrives after that is late: it is used in a later round when its staleness (server steps since
its theta was generated) is within bounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from common.config import ScheduleSection
from server_app.mailbox import Answer, Letter, Mailbox


class Update(Protocol):
    """What a good reply brings; `staleness` counts the server steps since its weights were sent."""

    @property
    def staleness(self) -> int:
        """Count them."""


U = TypeVar("U", bound=Update)


class RoundActions(Protocol[U]):
    """What the schedule asks of a method."""

    def letters(self, client_ids: Sequence[str]) -> Iterator[Letter]:
        """Generate fresh theta for these clients and wrap it up, each when it is asked for."""

    def accept(self, answer: Answer) -> U | None:
        """Turn a good answer into an update; None when it is rejected (and logged, counted)."""

    def step(self, updates: Sequence[U]) -> None:
        """Take one server step."""


@dataclass
class RoundOutcome:
    """What happened to the participants of one round, in client ids and counts."""

    accepted: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    skipped_busy: list[str] = field(default_factory=list)
    late_used: int = 0
    late_dropped: int = 0
    num_steps: int = 0


class Schedule:
    """Runs rounds over a mailbox; messages of stragglers stay in flight from round to round."""

    def __init__(self, section: ScheduleSection, mailbox: Mailbox) -> None:
        self._section = section
        self._mailbox = mailbox

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
        """Train every participant once.

        Parameters
        ----------
        participants : (client_id, node_id) pairs in the order in which they train.
        last : whether no round follows: then `close-fraction` does not apply, for whoever is left
            behind now would miss the final model.
        """
        state = _RoundState[U](server_round, list(participants), self.slots(len(participants)))
        state.enough = 1.0 if last else self._section.close_fraction
        deadline = self._deadline()
        while not self._closed(state, deadline):
            self._dispatch(state, actions)
            for answer in self._mailbox.poll():
                self._receive(state, answer, actions)
                if len(state.buffer) >= state.buffer_size:
                    self._step(state, actions)
        self._mailbox.drop_unsent()
        if state.buffer:
            self._step(state, actions)
        state.outcome.skipped_busy = [client_id for client_id, _ in state.queue]
        state.outcome.unanswered = sorted(state.pending)
        return state.outcome

    def _deadline(self) -> float:
        seconds = self._section.round_deadline_s
        return time.monotonic() + seconds if seconds else math.inf

    def _closed(self, state: _RoundState[U], deadline: float) -> bool:
        if not state.pending and not any(self._ready(state)):
            return not state.queue or not len(self._mailbox) or self._late(state, deadline)
        return self._late(state, deadline)

    def _late(self, state: _RoundState[U], deadline: float) -> bool:
        answered = len(state.outcome.accepted) / max(1, state.num_participants)
        done = answered + len(state.outcome.failed) / max(1, state.num_participants)
        if state.enough < 1 and done >= state.enough and not self._ready(state):
            return True
        return answered >= self._section.min_fraction and time.monotonic() >= deadline

    def _ready(self, state: _RoundState[U]) -> list[tuple[str, int]]:
        busy = self._mailbox.busy_nodes()
        return [pair for pair in state.queue if pair[1] not in busy]

    def _dispatch(self, state: _RoundState[U], actions: RoundActions[U]) -> None:
        free = state.max_in_flight - len(state.pending) - len(state.buffer)
        chosen = self._ready(state)[: max(free, 0)]
        if not chosen:
            return
        leaving = {client_id for client_id, _ in chosen}
        state.queue = [pair for pair in state.queue if pair[0] not in leaving]
        state.pending |= leaving
        letters = actions.letters([client_id for client_id, _ in chosen])
        # Without a step in between, a letter may as well be made when the grid has use for it.
        # An asynchronous buffer steps while others train: there theta is that of the dispatch.
        self._mailbox.send(letters if state.synchronous else list(letters))

    def _receive(self, state: _RoundState[U], answer: Answer, actions: RoundActions[U]) -> None:
        client_id, on_time = answer.ticket.client_id, answer.ticket.server_round == state.number
        update = actions.accept(answer)
        if on_time:
            state.pending.discard(client_id)
            (state.outcome.accepted if update else state.outcome.failed).append(client_id)
        elif update and update.staleness <= self._section.max_staleness:
            state.outcome.late_used += 1
        else:
            state.outcome.late_dropped += 1
            return
        if update:
            state.buffer.append(update)

    def _step(self, state: _RoundState[U], actions: RoundActions[U]) -> None:
        updates, state.buffer = state.buffer, []
        actions.step(updates)
        state.outcome.num_steps += 1


class _RoundState(Generic[U]):
    """The moving parts of one round."""

    def __init__(self, number: int, queue: list[tuple[str, int]], slots: tuple[int, int]) -> None:
        self.number = number
        self.queue = queue
        self.num_participants = len(queue)
        self.enough = 1.0
        self.max_in_flight, self.buffer_size = slots
        self.synchronous = self.buffer_size == self.max_in_flight
        self.pending: set[str] = set()
        self.buffer: list[U] = []
        self.outcome = RoundOutcome()
