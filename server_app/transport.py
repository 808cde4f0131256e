"""Messages in flight: at most one per node, answered in any order, late or never.

One mechanism for Ray, for separate machines and for the in-process engine: push, then poll. A
reply is matched by the message it answers, never by the node it comes from: errors that the
SuperLink makes up carry the SuperLink's own node id.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.records import payload_bytes

PUSH_BATCH = 8
"""Messages pushed at once: the grid holds a second, encoded copy of all of them meanwhile."""

WINDOW_PER_WORKER = 2
"""Messages that lie ready for each worker of a grid that says how many it has."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.2


@dataclass(frozen=True)
class Ticket:
    """What the server remembers of one message in flight.

    `version` is the number of server steps taken when its theta was generated; `sent_at` is
    `time.monotonic()` in seconds. The answer is waited for `patience_s`, the mailbox's time to live
    if that is shorter.
    """

    client_id: str
    node_id: int
    message_type: str
    server_round: int
    version: int = 0
    sent_at: float = 0.0
    patience_s: float = math.inf

    @property
    def source(self) -> str:
        """Words that start an error message about the reply."""
        return f"{self.message_type} reply of client {self.client_id} in round {self.server_round}"


@dataclass(frozen=True)
class Letter:
    """A message that is about to be sent."""

    ticket: Ticket
    content: RecordDict


@dataclass(frozen=True)
class Answer:
    """What became of a message: content, or the reason why there is none."""

    ticket: Ticket
    content: RecordDict | None
    failure: str = ""
    seconds: float = 0.0


class Mailbox:
    """Sends letters and yields answers; counts payload bytes both ways.

    Parameters
    ----------
    grid : Flower's grid, or anything with its push and pull. A grid with an attribute `workers`
        answers so many messages at a time, and gets letters as it has use for them; others get
        all letters at once.
    timeout_s : time to live of a message; a node that did not answer by then is given up on.
    """

    def __init__(self, grid: Grid, timeout_s: float) -> None:
        self._grid = grid
        self._timeout_s = timeout_s
        self._window = WINDOW_PER_WORKER * int(getattr(grid, "workers", 0)) or math.inf
        self._unsent: deque[Iterator[Letter]] = deque()
        self._in_flight: dict[str, Ticket] = {}
        self._refused: list[Ticket] = []
        self._kept: list[Answer] = []
        self._wait_s = _FIRST_WAIT_S
        self.bytes_down = 0
        self.bytes_up = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def busy_nodes(self) -> set[int]:
        """Return the nodes that have a message in flight."""
        return {ticket.node_id for ticket in self._in_flight.values()}

    def send(self, letters: Iterable[Letter]) -> None:
        """Push letters; those that the grid refuses are answered as failures at the next poll.

        A lazy iterable is asked for no more than the grid has use for; `poll` goes on with it.
        """
        self._unsent.append(iter(letters))
        self._push()
        self._wait_s = _FIRST_WAIT_S

    def drop_unsent(self) -> None:
        """Forget the letters that were not pushed yet."""
        self._unsent.clear()

    def _push(self) -> None:
        """Push letters, a batch at a time, until the window is full."""
        while self._unsent and len(self._in_flight) < self._window:
            part = list(islice(self._unsent[0], PUSH_BATCH))
            if len(part) < PUSH_BATCH:
                self._unsent.popleft()
            if not part:
                continue
            messages = [self._message(letter) for letter in part]
            accepted = set(self._grid.push_messages(messages))
            for letter, message in zip(part, messages, strict=True):
                if message.metadata.message_id in accepted:
                    self._in_flight[message.metadata.message_id] = letter.ticket
                    self.bytes_down += payload_bytes(letter.content)
                else:
                    self._refused.append(letter.ticket)

    def _message(self, letter: Letter) -> Message:
        return Message(
            letter.content,
            letter.ticket.node_id,
            letter.ticket.message_type,
            ttl=self._patience_s(letter.ticket),
            group_id=str(letter.ticket.server_round),
        )

    def poll(self) -> list[Answer]:
        """Return the answers that are there now; wait a little, and longer each time, if none."""
        answers = self._kept + [
            Answer(ticket, None, "the node is unknown or offline") for ticket in self._refused
        ]
        self._kept, self._refused = [], []
        self._push()
        if self._in_flight:
            for reply in self._grid.pull_messages(list(self._in_flight)):
                ticket = self._in_flight.pop(reply.metadata.reply_to_message_id, None)
                if ticket is not None:
                    answers.append(self._answer(ticket, reply))
        answers.extend(self._expired())
        if answers:
            self._wait_s = _FIRST_WAIT_S
        elif self._in_flight:
            time.sleep(self._wait_s)
            self._wait_s = min(self._wait_s * 1.3, _LONGEST_WAIT_S)
        return answers

    def exchange(self, letters: Iterable[Letter], *, window: int = 64) -> Iterator[Answer]:
        """Send letters and yield each answer as it comes, until every one has come or failed.

        At most `window` of these letters are in flight, so that a lazy iterable of letters never
        lies in memory as a whole. Answers to other letters are kept for the next `poll`.
        """
        source, wanted, others = iter(letters), set[Ticket](), list[Answer]()
        while True:
            part = list(islice(source, window - len(wanted)))
            wanted |= {letter.ticket for letter in part}
            self.send(part)
            if not wanted:
                break
            for answer in self.poll():
                if answer.ticket in wanted:
                    wanted.discard(answer.ticket)
                    yield answer
                else:
                    others.append(answer)
        self._kept.extend(others)

    def _answer(self, ticket: Ticket, reply: Message) -> Answer:
        seconds = time.monotonic() - ticket.sent_at
        if reply.has_error():
            reason = str(reply.error.reason)
            if "ActorDiedError" in reason:
                reason += (
                    ". A Ray worker process died, perhaps for lack of memory; Ray repeats this "
                    "answer for the rest of the run. Resume with fewer clients at once."
                )
            return Answer(ticket, None, f"error {reply.error.code}: {reason}", seconds)
        self.bytes_up += payload_bytes(reply.content)
        return Answer(ticket, reply.content, seconds=seconds)

    def _expired(self) -> Iterable[Answer]:
        now = time.monotonic()
        for message_id, ticket in list(self._in_flight.items()):
            patience = self._patience_s(ticket)
            if now - ticket.sent_at > patience:
                del self._in_flight[message_id]
                yield Answer(ticket, None, f"no answer within {patience:g} s", now - ticket.sent_at)

    def _patience_s(self, ticket: Ticket) -> float:
        return min(ticket.patience_s, self._timeout_s)
