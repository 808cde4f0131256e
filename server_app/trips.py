"""What every method's exchanges share: the way to the clients, who takes part, what came back.

Nothing here knows what a method learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flwr.app import RecordDict

from common import wire
from common.compression import Float32
from common.config import RunConfig
from common.wire import Evaluation, Header, TrainReply
from server_app.aggregation.diagnostics import StepDiagnostics
from server_app.replies import ReplyDesk
from server_app.transport import Letter, Mailbox, Ticket

T = TypeVar("T")


@dataclass(kw_only=True)
class Post:
    """The way to the clients, and how many server steps were taken so far."""

    config: RunConfig
    federation_id: str
    mailbox: Mailbox
    desk: ReplyDesk
    num_steps: int = 0

    def header(self, server_round: int) -> Header:
        """Return the header of this round's messages."""
        return Header(self.federation_id, server_round, self.config.wire.wire_precision)


@dataclass
class RoundTally:
    """What one round measured, collected while answers come in."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    train_losses: dict[str, tuple[int, float]] = field(default_factory=dict)
    diagnostics: list[StepDiagnostics] = field(default_factory=list)
    global_deltas: dict[str, tuple[int, Float32]] = field(default_factory=dict)
    global_step: StepDiagnostics | None = None
    seconds_clients: float = 0.0
    seconds_server: float = 0.0
    global_accepted: int = 0

    def note(self, client_id: str, reply: TrainReply) -> None:
        """Take the counts and losses of a training reply."""
        self.seconds_clients += reply.seconds
        if reply.delta is not None:
            self.train_losses[client_id] = (reply.num_examples, reply.train_loss)
        if reply.evaluation is not None:
            self.evaluations[client_id] = reply.evaluation


@dataclass(frozen=True)
class Roster:
    """The participants of a round: client_id -> node_id, in the order in which they train.

    `patience_s` bounds every trip but the personal training, whose deadline is the schedule's.
    """

    server_round: int
    nodes: dict[str, int]
    patience_s: float = math.inf

    def ticket(self, client_id: str, message_type: str, version: int = 0) -> Ticket:
        """Make the ticket of a message that is sent now."""
        return Ticket(
            client_id=client_id,
            node_id=self.nodes[client_id],
            message_type=message_type,
            server_round=self.server_round,
            version=version,
            sent_at=time.monotonic(),
            patience_s=math.inf if message_type == wire.TRAIN_PERSONAL else self.patience_s,
        )


def without_busy(roster: Roster, busy: set[int]) -> Roster:
    """Leave out clients whose node still works on an earlier message."""
    return replace(roster, nodes={c: n for c, n in roster.nodes.items() if n not in busy})


def ask_all(
    post: Post, letters: Iterable[Letter], decode: Callable[[RecordDict, str], T]
) -> dict[str, T]:
    """Send letters; return the good replies by client_id."""
    found: dict[str, T] = {}
    for answer in post.mailbox.exchange(letters):
        reply = post.desk.read(answer, decode)
        if reply is not None:
            found[answer.ticket.client_id] = reply
    return found
