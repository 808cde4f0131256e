"""Train several clients of one round in one batched call (in-process engine).

What a client sends and keeps is what it would by itself, up to float rounding. A message that
cannot be batched (layers of one's own, another device, a config that is refused) is left to be
handled by itself, where its errors are raised as usual.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from client_app.methods.mhpfedhn import PERSONAL, MHpFedHN, Role
from client_app.models.instances import instance_of
from client_app.participant import Participant
from client_app.training.batched import Outcome, can_train_together, train_cohort
from client_app.training.batched_evaluation import evaluate_cohort
from client_app.training.loop import Teacher, delta
from common.compression import Float32
from common.config import DistillSection
from common.errors import MHpFedHNError
from common.messages import DISTIL, EVALUATE_FIRST, TRAIN, Evaluation, TrainReply
from common.records import Content, Received, encode


@dataclass(frozen=True)
class _Ready:
    """A client that can join a batched call; `teacher` is w_g as it was sent, if at all."""

    position: int
    method: MHpFedHN
    task: Received
    teacher: Float32 | None

    @property
    def starts(self) -> dict[Role, Float32]:
        """What is to be trained, in this order, and from which weights."""
        return {role: self.method.start(role, self.task) for role in self.method.roles(self.task)}

    @property
    def distill(self) -> DistillSection | None:
        """How it distils, if it does."""
        return self.task.section(DistillSection) if self.task.flag(DISTIL) else None

    @property
    def kind(self) -> Hashable:
        """What clients must have in common to be trained by one call."""
        task, participant = self.task, self.method.participant
        sent = None if self.teacher is None else sha256(self.teacher.data).digest()
        models = tuple(self.method.kind_of(role) for role in self.starts)
        training, tests = self.method.training(task), task.flag(EVALUATE_FIRST)
        alike = (training, self.distill, tests, participant.section.theta_offset)
        return models, participant.data.looks, sent, alike

    def fits(self) -> bool:
        """Whether all that it trains can be batched."""
        kinds = (self.method.kind_of(role) for role in self.starts)
        return all(can_train_together(instance_of(kind).model.module) for kind in kinds)


def reply_together(pairs: Sequence[tuple[Message, Context]]) -> list[RecordDict | None]:
    """Return replies to training messages; None where the caller has to do it one by one."""
    replies: list[RecordDict | None] = [None] * len(pairs)
    groups: dict[Hashable, list[_Ready]] = {}
    for position, (message, context) in enumerate(pairs):
        ready = _open(position, message, context)
        if ready is not None:
            groups.setdefault(ready.kind, []).append(ready)
    for group in groups.values():
        if len(group) > 1:
            for ready, content in zip(group, _train(group), strict=True):
                replies[ready.position] = content
    return replies


def _open(position: int, message: Message, context: Context) -> _Ready | None:
    if message.metadata.message_type != TRAIN:
        return None
    try:
        participant = Participant.open(context)
        if not _is_batchable(participant):
            return None
        task, method = participant.task(message.content), MHpFedHN(participant)
        ready = _Ready(position, method, task, method.teacher_theta(task))
        return ready if ready.fits() else None
    except MHpFedHNError:
        return None  # raised again, and reported, when the client trains by itself


def _is_batchable(participant: Participant) -> bool:
    """Whether what it does is known here: its method's models and its tests, and no other."""
    config = participant.config
    known = not (config.is_baseline or config.has_personal_common)
    return known and not participant.section.measure_alone


def _train(group: Sequence[_Ready]) -> list[RecordDict]:
    found = {role: _cohort(group, role) for role in group[0].starts}
    replies = []
    for i, ready in enumerate(group):
        method, task, arrays = ready.method, ready.task, {}
        for role, shared in found.items():
            method.keep_buffers(role, task, shared.outcomes[i].buffers)
            arrays[role.delta] = method.sent_up(role, task, shared.changes[i])
        last = list(found.values())[-1].outcomes[i].trained
        reply = TrainReply(
            num_examples=last.num_examples,
            train_loss=last.loss,
            seconds=sum(shared.outcomes[i].trained.seconds for shared in found.values()),
            evaluation=found[PERSONAL].evaluations[i] if PERSONAL in found else None,
        )
        top_k = method.participant.config.wire.uplink_top_k
        replies.append(encode(task.header, Content(reply.settings(), arrays), top_k=top_k))
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
    module = instance_of(first.method.kind_of(role)).model.module
    starts = first.method.placed(role, np.stack([r.starts[role] for r in group]))
    members = [r.method.member(role, r.task, x) for r, x in zip(group, starts, strict=True)]
    evaluations: list[Evaluation | None] = [None] * len(group)
    if role is PERSONAL and first.task.flag(EVALUATE_FIRST):
        evaluations[:] = evaluate_cohort(module, members)
    teacher, distill = None, first.distill
    if role is PERSONAL and first.teacher is not None and distill is not None:
        teacher = Teacher(first.method.teacher(first.teacher, first.task).module, distill)
    section = first.method.training(first.task)
    outcomes = train_cohort(module, members, section, clip=role.clip, teacher=teacher)
    trained = torch.stack([outcome.theta for outcome in outcomes])
    return _Shared(outcomes, list(delta(starts, trained).cpu().numpy()), evaluations)
