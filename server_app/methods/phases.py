"""The exchanges of one round of MH-pFedHN: global phase, personal phase, fresh weights for all.

Each builds letters from counts and vectors and folds the answers into the hypernetwork. None of
them knows an architecture.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict

from common import wire
from common.compression import Float32
from common.wire import TrainReply, TrainTask
from server_app.aggregation.adam import ClientUpdate, ServerUpdate
from server_app.aggregation.clipping import NormClip
from server_app.clients import GLOBAL_ID
from server_app.hypernet.blocks import blocks
from server_app.hypernet.network import Hypernetwork
from server_app.transport import Answer, Letter
from server_app.trips import Post, Roster, RoundTally


@dataclass(kw_only=True)
class Core(Post):
    """The way to the clients, and the learning state of the hypernetwork.

    `frozen_clients` are those whose embedding must not move (`novel-only`).
    """

    hypernet: Hypernetwork
    update: ServerUpdate
    norms: NormClip
    frozen_clients: set[str] = field(default_factory=set)

    @property
    def trains_global(self) -> bool:
        """Whether w_g learns in this run: not without GD, and not when only new clients learn."""
        return self.config.distils and not self.config.run.novel_only

    def generate(self, client_ids: Sequence[str]) -> dict[str, Float32]:
        """Generate theta (K_i,) of each client with the current phi, as numpy float32."""
        generated = self.hypernet.generate(client_ids)
        if self.hypernet.device.type == "cpu":
            return {client_id: theta.numpy() for client_id, theta in generated.items()}
        together = torch.cat(list(generated.values())).cpu()  # one transfer
        pieces = torch.split(together, [theta.numel() for theta in generated.values()])
        return {i: piece.numpy() for i, piece in zip(generated, pieces, strict=True)}

    def thetas(self, client_ids: Sequence[str]) -> Iterator[tuple[str, Float32]]:
        """Generate as `generate`, a block of clients at a time, each when it is asked for."""
        for block in blocks(client_ids, self.hypernet.num_parameters):
            yield from self.generate(block).items()


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
        top_k=core.config.wire.uplink_top_k,
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
    tally.global_step = core.update.step_global(GLOBAL_ID, updates, progress=progress)
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

    @property
    def num_steps(self) -> int:
        """Count the server steps taken so far."""
        return self._core.num_steps

    def letters(self, client_ids: Sequence[str]) -> Iterator[Letter]:
        """Generate fresh theta for these clients with the phi of the moment it is asked for."""
        thetas = self._core.thetas(client_ids)
        for _ in client_ids:
            started = time.monotonic()
            letter = self._letter(*next(thetas))
            self._tally.seconds_server += time.monotonic() - started
            yield letter

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
        usual = self._core.norms.clip_all(updates, self._core.hypernet.group_key)
        self._tally.diagnostics.append(self._core.update.step(usual, progress=progress))
        self._core.num_steps += 1
        self._tally.seconds_server += time.monotonic() - started


def theta_letters(core: Core, roster: Roster, message_type: str) -> Iterator[Letter]:
    """Generate everyone's newest theta, block by block, and wrap it up."""
    header = core.header(roster.server_round)
    for client_id, theta in core.thetas(list(roster.nodes)):
        yield Letter(roster.ticket(client_id, message_type), wire.encode_theta(header, theta))
