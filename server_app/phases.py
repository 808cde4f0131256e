"""The exchanges of one round: global phase, personal phase, evaluation, finish.

Each builds letters from counts and vectors and folds the answers into the hypernetwork. None of
them knows an architecture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from flwr.app import RecordDict

from common import wire
from common.codec import Float32
from common.config import RunConfig
from common.wire import Evaluation, Header, TrainReply, TrainTask
from server_app.hypernet import Hypernetwork
from server_app.mailbox import Answer, Letter, Mailbox, Ticket
from server_app.norms import NormClip
from server_app.registry import GLOBAL_ID
from server_app.replies import ReplyDesk
from server_app.update import ClientUpdate, ServerUpdate, StepDiagnostics

T = TypeVar("T")

GENERATE_BLOCK = 16
"""Clients whose theta is generated in one batched product while letters are made lazily."""


@dataclass
class Core:
    """What all phases share: the learning state and the way out to the clients.

    `frozen_clients` are those whose embedding must not move (`novel-only`).
    """

    config: RunConfig
    federation_id: str
    hypernet: Hypernetwork
    update: ServerUpdate
    mailbox: Mailbox
    desk: ReplyDesk
    norms: NormClip
    num_steps: int = 0
    frozen_clients: set[str] = field(default_factory=set)

    @property
    def trains_global(self) -> bool:
        """Whether w_g learns in this run: not without GD, and not when only new clients learn."""
        return self.config.distils and not self.config.run.novel_only

    def header(self, server_round: int) -> Header:
        """Return the header of this round's messages."""
        return Header(self.federation_id, server_round, self.config.wire.wire_precision)

    def generate(self, client_ids: Sequence[str]) -> dict[str, Float32]:
        """Generate theta (K_i,) of each client with the current phi, as numpy float32."""
        generated = self.hypernet.generate(client_ids)
        return {client_id: theta.cpu().numpy() for client_id, theta in generated.items()}


@dataclass
class RoundTally:
    """What one round measured, collected while answers come in."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    train_losses: dict[str, tuple[int, float]] = field(default_factory=dict)
    diagnostics: list[StepDiagnostics] = field(default_factory=list)
    global_deltas: dict[str, tuple[int, Float32]] = field(default_factory=dict)
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


def _blocks(client_ids: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(client_ids)
    while block := list(islice(rest, GENERATE_BLOCK)):
        yield block


class GlobalPhase:
    """Phase 1 of MH-pFedHNGD (paper section 3.3): every client trains a copy of w_g."""

    def __init__(self, core: Core, roster: Roster, tally: RoundTally, theta: Float32) -> None:
        self._core, self._roster, self._tally = core, roster, tally
        self._theta = theta

    def run(self) -> None:
        """Send w_g to everyone, collect the deltas, take one server step on their mean."""
        answers = self._core.mailbox.exchange(self._letter(c) for c in self._roster.nodes)
        for answer in answers:
            reply = self._core.desk.read_training(answer, self._decode)
            if reply is not None and reply.global_delta is not None:
                client_id = answer.ticket.client_id
                self._tally.note(client_id, reply)
                self._tally.global_deltas[client_id] = (reply.num_examples, reply.global_delta)
        fold_global(self._core, self._tally, progress=self._roster.server_round - 1.0)

    def _letter(self, client_id: str) -> Letter:
        task = TrainTask(
            header=self._core.header(self._roster.server_round),
            training=self._core.config.training,
            global_theta=self._theta,
            train_global=True,
        )
        ticket = self._roster.ticket(client_id, wire.TRAIN_GLOBAL)
        return Letter(ticket, wire.encode_train_task(task))

    def _decode(self, content: RecordDict, source: str) -> TrainReply:
        return decode_checked(self._core, content, 0, self._theta.size, source)


def decode_checked(
    core: Core, content: RecordDict, num_parameters: int, num_global: int, source: str
) -> TrainReply:
    """Decode a training reply and check the norms of its deltas."""
    reply = wire.decode_train_reply(
        content,
        num_parameters=num_parameters,
        num_global_parameters=num_global,
        source=source,
    )
    for name, x in ((wire.DELTA, reply.delta), (wire.GLOBAL_DELTA, reply.global_delta)):
        if x is not None:
            core.desk.check_norm(x, name, source)
    return reply


def fold_global(core: Core, tally: RoundTally, *, progress: float) -> None:
    """Take ONE server step on sum_i (n_i / sum n) J_g^T delta_g,i (method.md, Phase 1)."""
    updates = [
        ClientUpdate(client_id, torch.from_numpy(delta), weight=float(num_examples))
        for client_id, (num_examples, delta) in tally.global_deltas.items()
    ]
    tally.global_accepted = len(updates)
    if not updates:
        return
    started = time.monotonic()
    core.update.step_global(GLOBAL_ID, updates, progress=progress)
    core.num_steps += 1
    tally.seconds_server += time.monotonic() - started


class PersonalPhase:
    """The personal models' exchange: the `RoundActions` of the schedule.

    Parameters
    ----------
    global_theta : w_g as generated at the start of the round (teacher), or None without GD.
    holders : clients that already hold this w_g from the global phase; the others get it again.
    """

    def __init__(
        self,
        core: Core,
        roster: Roster,
        tally: RoundTally,
        global_theta: Float32 | None = None,
        holders: frozenset[str] = frozenset(),
    ) -> None:
        self._core, self._roster, self._tally = core, roster, tally
        self._global_theta, self._holders = global_theta, holders
        self._fused = core.trains_global and core.config.distill.gd_mode == "fused"
        self._num_accepted = 0

    def letters(self, client_ids: Sequence[str]) -> Sequence[Letter]:
        """Generate fresh theta for these clients, in one batched product per head group."""
        started = time.monotonic()
        thetas = self._core.generate(client_ids)
        made = [self._letter(client_id, thetas[client_id]) for client_id in client_ids]
        self._tally.seconds_server += time.monotonic() - started
        return made

    def _letter(self, client_id: str, theta: Float32) -> Letter:
        config = self._core.config
        needs_global = self._fused or client_id not in self._holders
        task = TrainTask(
            header=self._core.header(self._roster.server_round),
            training=config.training,
            theta=theta,
            global_theta=self._global_theta if needs_global else None,
            train_global=self._fused,
            distill=config.distill if config.distils else None,
            evaluate=config.run.evaluation == "fused",
        )
        ticket = self._roster.ticket(client_id, wire.TRAIN_PERSONAL, self._core.num_steps)
        return Letter(ticket, wire.encode_train_task(task))

    def accept(self, answer: Answer) -> ClientUpdate | None:
        """Turn a good answer into an update for the server's optimiser."""
        client_id = answer.ticket.client_id
        reply = self._core.desk.read_training(answer, lambda c, s: self._decode(client_id, c, s))
        if reply is None or reply.delta is None:
            return None
        self._tally.note(client_id, reply)
        self._num_accepted += 1
        if reply.global_delta is not None:
            self._tally.global_deltas[client_id] = (reply.num_examples, reply.global_delta)
        return ClientUpdate(
            client_id=client_id,
            delta=torch.from_numpy(reply.delta),
            staleness=self._core.num_steps - answer.ticket.version,
        )

    def _decode(self, client_id: str, content: RecordDict, source: str) -> TrainReply:
        num_parameters = self._core.hypernet.num_parameters(client_id)
        fused = self._fused and self._global_theta is not None
        num_global = self._global_theta.size if fused and self._global_theta is not None else 0
        return decode_checked(self._core, content, num_parameters, num_global, source)

    def step(self, updates: Sequence[ClientUpdate]) -> None:
        """Take one server step; its position in the round drives warm-up and decay."""
        started = time.monotonic()
        done = min(1.0, self._num_accepted / max(1, len(self._roster.nodes)))
        progress = self._roster.server_round - 1 + done
        usual = self._core.norms.clip("personal", updates)
        self._tally.diagnostics.append(self._core.update.step(usual, progress=progress))
        self._core.num_steps += 1
        self._tally.seconds_server += time.monotonic() - started


def evaluate(core: Core, roster: Roster) -> dict[str, Evaluation]:
    """Let every participant test freshly generated weights, with no local fine-tuning."""
    return _ask_all(core, roster, wire.EVALUATE_PERSONAL, wire.decode_evaluation)


def finish(core: Core, roster: Roster) -> dict[str, str]:
    """Hand every participant its final personal parameters; returns where each stored them."""
    return _ask_all(core, roster, wire.FINISH, wire.decode_finish_reply)


def _ask_all(
    core: Core, roster: Roster, message_type: str, decode: Callable[[RecordDict, str], T]
) -> dict[str, T]:
    """Send everyone fresh weights; return the good replies by client_id."""
    found: dict[str, T] = {}
    for answer in core.mailbox.exchange(_theta_letters(core, roster, message_type)):
        reply = core.desk.read(answer, decode)
        if reply is not None:
            found[answer.ticket.client_id] = reply
    return found


def _theta_letters(core: Core, roster: Roster, message_type: str) -> Iterator[Letter]:
    header = core.header(roster.server_round)
    for block in _blocks(roster.nodes):
        for client_id, theta in core.generate(block).items():
            yield Letter(roster.ticket(client_id, message_type), wire.encode_theta(header, theta))


def mean_diagnostics(steps: Sequence[StepDiagnostics]) -> dict[str, float]:
    """Average the diagnostics of a round's server steps, key by key."""
    if not steps:
        return {}
    rows = [vars(step) for step in steps]
    return {key: float(np.mean([float(row[key]) for row in rows])) for key in rows[0]}


def without_busy(roster: Roster, busy: set[int]) -> Roster:
    """Leave out clients whose node still works on an earlier message."""
    return replace(roster, nodes={c: n for c, n in roster.nodes.items() if n not in busy})
