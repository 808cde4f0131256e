"""Messages in flight: at most one a node, answered in any order, late or never.

One mechanism for Ray, for separate machines and for the in-process engine: push, then poll. A reply
is matched by the message it answers, never by the node it comes from: errors that the SuperLink
makes up carry the SuperLink's own node id. `Transport.read` is the one place where replies are
decoded and refused; nothing in a reply can end the run.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.clock import Clock
from common.compression import Precision
from common.errors import MHpFedHNError
from common.files import printable
from common.inflation import again, is_lost
from common.log import logger
from common.messages import Pending, Recipient
from common.records import Content, Header, Received, encode, payload_bytes

T = TypeVar("T")

PUSH_BATCH = 8
"""Messages pushed at once: the grid holds a second, encoded copy of all of them meanwhile."""

WINDOW_PER_WORKER = 2
"""Messages that lie ready for each worker of a grid that says how many it has."""

NO_ANSWER = "no answer"
"""How the failure of a node begins that said nothing until its patience was over."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.2


@dataclass(frozen=True)
class Outgoing:
    """A message that is about to be sent."""

    pending: Pending
    content: RecordDict


@dataclass(frozen=True)
class Arrival:
    """What became of a message: content as it came, or the reason why there is none."""

    pending: Pending
    content: RecordDict | None
    failure: str = ""


class Transport:
    """Sends messages, yields what arrives, reads replies; counts payload bytes both ways.

    A grid (Flower's, or anything with its push and pull) with an attribute `workers` answers so
    many messages at a time, and gets them as it has use for them; others get all at once. A node
    that did not answer a message within `timeout_s` is given up on.

    Attributes
    ----------
    rejected : number of rejected or failed replies by client_id, over the whole run.
    recent : the last ten reasons.
    misfits : clients whose content did not fit what they registered, until somebody clears it.
    silent : those that did not answer within `timeout_s`, likewise.
    """

    def __init__(
        self,
        grid: Grid,
        method: str,
        *,
        precision: Precision = "float32",
        timeout_s: float = math.inf,
        clock: Clock = time,
    ) -> None:
        self.grid = grid
        self.clock = clock
        self.federation_id = secrets.token_hex(8)
        self.bytes_down = self.bytes_up = 0
        self.rejected: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=10)
        self.misfits, self.silent = set[str](), set[str]()
        self._method, self._precision, self._timeout_s = method, precision, timeout_s
        self._window = WINDOW_PER_WORKER * int(getattr(grid, "workers", 0)) or math.inf
        self._unsent: deque[Iterator[Outgoing]] = deque()
        self._in_flight: dict[str, Pending] = {}
        self._ready: list[Arrival] = []
        self._wait_s = _FIRST_WAIT_S

    def __len__(self) -> int:
        return len(self._in_flight)

    def most_bytes(self, message_id: str) -> int | None:
        """Return how many bytes the reply to a message may have; None where none is waited for."""
        pending = self._in_flight.get(message_id)
        return pending.most_bytes if pending else None

    def busy_nodes(self) -> set[int]:
        """Return the nodes that have a message in flight."""
        return {pending.node_id for pending in self._in_flight.values()}

    def message(
        self,
        message_type: str,
        recipient: Recipient,
        content: Content,
        *,
        server_round: int,
        version: int = 0,
        patience_s: float = math.inf,
    ) -> Outgoing:
        """Make a message that is sent now, with a nonce of its own."""
        nonce = secrets.token_hex(8)
        header = Header(self.federation_id, self._method, server_round, nonce, self._precision)
        (client_id, node_id, most), now = recipient, self.clock.monotonic()
        mine = version, now, patience_s, most
        pending = Pending(client_id, node_id, message_type, header, *mine)
        return Outgoing(pending, encode(header, content))

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Push messages; those that the grid refuses arrive as failures at the next poll.

        A lazy iterable is asked for no more than the grid has use for; `poll` goes on with it.
        """
        self._unsent.append(iter(messages))
        self._push()
        self._wait_s = _FIRST_WAIT_S

    def drop_unsent(self) -> None:
        """Forget the messages that were not pushed yet."""
        self._unsent.clear()

    def attempt(self, call: Callable[[], T]) -> T:
        """Ask something of the grid, again where its SuperLink stumbles over it."""
        try:
            return call()
        except Exception as error:
            return again(call, error, self.clock.sleep)

    def _push(self) -> None:
        """Push messages, a batch at a time, until the window is full."""
        while self._unsent and len(self._in_flight) < self._window:
            part = list(islice(self._unsent[0], PUSH_BATCH))
            if len(part) < PUSH_BATCH:
                self._unsent.popleft()
            if part:
                self._hand_over(part, [*map(self._flower_message, part)])

    def _hand_over(self, part: list[Outgoing], messages: list[Message]) -> None:
        """Push some messages at once; where that fails, each: a node may have been given it."""
        try:
            push = partial(self.grid.push_messages, messages)
            accepted = set(self.attempt(push) if len(part) > 1 else push())
        except Exception as error:
            if is_lost(error):
                raise
            if len(part) > 1:
                for outgoing, message in zip(part, messages, strict=True):
                    self._hand_over([outgoing], [message])
                return
            failure = f"it cannot be handed over: {type(error).__name__}: {error}"
            self._ready.append(Arrival(part[0].pending, None, failure))
            return
        for outgoing, message in zip(part, messages, strict=True):
            if message.metadata.message_id in accepted:
                self._in_flight[message.metadata.message_id] = outgoing.pending
                self.bytes_down += payload_bytes(outgoing.content)
            else:
                failure = "the node is unknown or offline"
                self._ready.append(Arrival(outgoing.pending, None, failure))

    def _flower_message(self, outgoing: Outgoing) -> Message:
        pending = outgoing.pending
        return Message(
            outgoing.content,
            pending.node_id,
            pending.message_type,
            ttl=self._patience_s(pending),
            group_id=pending.group_id,
        )

    def poll(self) -> list[Arrival]:
        """Return what has arrived by now; wait a little, and longer each time, if nothing has."""
        arrivals, self._ready = self._ready, []
        self._push()
        arrivals += self._pull(list(self._in_flight))
        arrivals += self._expired()
        if arrivals:
            self._wait_s = _FIRST_WAIT_S
        elif self._in_flight:
            self.clock.sleep(self._wait_s)
            self._wait_s = min(self._wait_s * 1.3, _LONGEST_WAIT_S)
        return arrivals

    def exchange(self, messages: Iterable[Outgoing], *, window: int = 64) -> Iterator[Arrival]:
        """Send messages and yield what arrives, until every one was answered or has failed.

        At most `window` of these messages are in flight, so that a lazy iterable of them never
        lies in memory as a whole. Replies to other messages are kept for the next `poll`.
        """
        source, wanted, others = iter(messages), set[Pending](), list[Arrival]()
        while True:
            part = list(islice(source, window - len(wanted)))
            wanted |= {outgoing.pending for outgoing in part}
            self.send(part)
            if not wanted:
                break
            for arrival in self.poll():
                if arrival.pending in wanted:
                    wanted.discard(arrival.pending)
                    yield arrival
                else:
                    others.append(arrival)
        self._ready += others

    def _pull(self, message_ids: list[str]) -> list[Arrival]:
        if not message_ids:
            return []
        try:
            pull = partial(self.grid.pull_messages, message_ids)
            replies = list(self.attempt(pull) if len(message_ids) > 1 else pull())
        except Exception as error:
            if is_lost(error):
                raise
            if len(message_ids) > 1:  # one of them cannot be put together: that one is given up on
                return [arrival for one in message_ids for arrival in self._pull([one])]
            failure = f"the reply cannot be read: {type(error).__name__}: {error}"
            return [Arrival(self._in_flight.pop(message_ids[0]), None, failure)]
        return [arrival for reply in replies for arrival in self._arrived(reply)]

    def _arrived(self, reply: Message) -> list[Arrival]:
        pending = self._in_flight.pop(reply.metadata.reply_to_message_id, None)
        if pending is None:
            return []
        if not reply.has_error():
            came, most = payload_bytes(reply.content), pending.most_bytes
            self.bytes_up += came
            if came <= most:
                return [Arrival(pending, reply.content)]
            failure = f"it has {came:,} bytes; {most:,} are enough for what the client registered"
            return [Arrival(pending, None, failure)]
        reason = str(reply.error.reason)
        if "ActorDiedError" in reason:
            reason += (
                ". A Ray worker process died, perhaps for lack of memory; Ray repeats this "
                "answer for the rest of the run. Resume with fewer clients at once."
            )
        return [Arrival(pending, None, f"error {reply.error.code}: {reason}")]

    def _expired(self) -> Iterator[Arrival]:
        for message_id, pending in list(self._in_flight.items()):
            patience = self._patience_s(pending)
            if self.clock.monotonic() - pending.sent_at > patience:
                self.silent |= {pending.client_id} if patience == self._timeout_s else set()
                del self._in_flight[message_id]
                yield Arrival(pending, None, f"{NO_ANSWER} within {patience:g} s")

    def _patience_s(self, pending: Pending) -> float:
        return min(pending.patience_s, self._timeout_s)

    def read(self, arrival: Arrival, read: Callable[[Received], T]) -> T | None:
        """Decode a reply with `read`; one that is no good is logged and counted: None.

        Refused, whatever the method, is a reply that answers another message, one that `read`
        raises over, and one with vectors that `read` has no use for.
        """
        pending = arrival.pending
        if arrival.content is None:
            self._reject(pending, arrival.failure)
            return None
        try:
            received = Received(arrival.content)
            pending.header.require_repeated(received.header)
            found = read(received)
            received.require_all_read()
        except Exception as error:  # a peer made the content up: whatever it makes `read` raise
            self.misfits.add(pending.client_id)
            kind = "" if isinstance(error, MHpFedHNError) else f"{type(error).__name__}: "
            self._reject(pending, f"{kind}{error}")
            return None
        return found

    def _reject(self, pending: Pending, reason: str) -> None:
        self.rejected[pending.client_id] += 1
        if len(text := printable(f"{pending.source}: {reason}")) > 1000:
            text = f"{text[:300]} ... {text[-700:]}"  # who, and why
        self.recent.append(text)
        logger.warning("Rejected: %s", text)
