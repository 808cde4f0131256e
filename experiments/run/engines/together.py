"""Answer several training messages of one round in one batched call (in-process engine).

What a client sends and keeps is what it would by itself, up to float rounding. A message that
cannot be batched (layers of one's own, another device, a config that is refused) is left to be
answered one by one, where its errors are raised as usual.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from client_app.participant import GLOBAL, PERSONAL, Participant, Role
from client_app.training.batched import (
    Outcome,
    Teacher,
    can_train_together,
    train_cohort,
)
from client_app.training.batched_evaluation import evaluate_cohort
from common import wire
from common.compression import Float32
from common.errors import MHpFedHNError
from common.parameters import delta
from common.wire import Evaluation, TrainReply, TrainTask


@dataclass(frozen=True)
class _Ready:
    """A client that can join a batched call; `global_theta` is w_g as it was sent, if at all."""

    place: int
    participant: Participant
    task: TrainTask
    global_theta: Float32 | None

    @property
    def starts(self) -> dict[Role, Float32]:
        """What is to be trained, in this order, and from which weights."""
        found = {}
        if self.task.train_global and self.global_theta is not None:
            found[GLOBAL] = self.global_theta
        if self.task.theta is not None:
            found[PERSONAL] = self.task.theta
        return found

    @property
    def kind(self) -> Hashable:
        """What clients must have in common to be trained by one call."""
        task, section = self.task, self.participant.section
        sent = None if self.global_theta is None else sha256(self.global_theta.data).digest()
        models = tuple(self.participant.kind_of(role) for role in self.starts)
        alike = (task.training, task.distill, task.evaluate, section.theta_offset)
        return models, self.participant.data.looks, sent, alike

    def fits(self) -> bool:
        """Whether all that it trains can be batched, and has the length that its model takes."""
        for role, theta in self.starts.items():
            module = self.participant.module(role)
            if theta.size != sum(p.numel() for p in module.parameters()):
                return False
            if not can_train_together(module):
                return False
        return bool(self.starts)


def answer_together(pairs: Sequence[tuple[Message, Context]]) -> list[RecordDict | None]:
    """Answer training messages; None stands where the caller has to do it one by one."""
    answers: list[RecordDict | None] = [None] * len(pairs)
    groups: dict[Hashable, list[_Ready]] = {}
    for place, (message, context) in enumerate(pairs):
        ready = _open(place, message, context)
        if ready is not None:
            groups.setdefault(ready.kind, []).append(ready)
    for group in groups.values():
        if len(group) > 1:
            for ready, content in zip(group, _train(group), strict=True):
                answers[ready.place] = content
    return answers


def _open(place: int, message: Message, context: Context) -> _Ready | None:
    if message.metadata.message_type not in (wire.TRAIN_PERSONAL, wire.TRAIN_GLOBAL):
        return None
    try:
        participant = Participant.open(context)
        if participant.config.is_baseline:
            return None
        source = f"{message.metadata.message_type} message to client {participant.client_id}"
        task = wire.decode_train_task(message.content, source)
        ready = _Ready(place, participant, task, participant.teacher_theta(task))
    except MHpFedHNError:
        return None  # raised again, and reported, when it is answered by itself
    untaught = task.distill is not None and ready.global_theta is None
    return ready if ready.fits() and not untaught else None


def _train(group: Sequence[_Ready]) -> list[RecordDict]:
    found = {role: _cohort(group, role) for role in group[0].starts}
    replies = []
    for i, ready in enumerate(group):
        last = list(found.values())[-1].outcomes[i].trained
        sent_up = {
            role: ready.participant.keep(
                role, ready.task, ready.starts[role], shared.outcomes[i].buffers, shared.changes[i]
            )
            for role, shared in found.items()
        }
        reply = TrainReply(
            num_examples=last.num_examples,
            train_loss=last.loss,
            seconds=sum(shared.outcomes[i].trained.seconds for shared in found.values()),
            server_round=ready.task.header.server_round,
            delta=sent_up.get(PERSONAL),
            global_delta=sent_up.get(GLOBAL),
            evaluation=found[PERSONAL].evaluations[i] if PERSONAL in found else None,
        )
        precision, top_k = ready.task.header.precision, ready.participant.config.wire.uplink_top_k
        replies.append(wire.encode_train_reply(reply, precision, top_k=top_k))
    return replies


@dataclass(frozen=True)
class _Shared:
    """What a batched call found: outcomes, deltas (P,), and tests of what was received."""

    outcomes: Sequence[Outcome]
    changes: Sequence[Float32]
    evaluations: Sequence[Evaluation | None]


def _cohort(group: Sequence[_Ready], role: Role) -> _Shared:
    """Test and train one of the models of all clients of a group.

    Their weights go to the device, and their deltas come from there, in one transfer each.
    """
    first = group[0]
    module = first.participant.module(role)
    starts = first.participant.placed(role, np.stack([r.starts[role] for r in group]))
    members = [
        r.participant.join_cohort(role, r.task, start)
        for r, start in zip(group, starts, strict=True)
    ]
    evaluations: list[Evaluation | None] = [None] * len(group)
    if role is PERSONAL and first.task.evaluate:
        evaluations[:] = evaluate_cohort(module, members)
    outcomes = train_cohort(
        module,
        members,
        first.task.training,
        clip=role.clip,
        teacher=_teacher(first) if role is PERSONAL else None,
    )
    trained = torch.stack([outcome.theta for outcome in outcomes])
    return _Shared(outcomes, list(delta(starts, trained).cpu().numpy()), evaluations)


def _teacher(ready: _Ready) -> Teacher | None:
    if ready.global_theta is None or ready.task.distill is None:
        return None
    return Teacher(ready.participant.teacher(ready.task, ready.global_theta), ready.task.distill)
