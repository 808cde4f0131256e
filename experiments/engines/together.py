"""Answer several training messages of one round in one batched call (in-process engine).

What a client sends and keeps is what it would by itself, up to float rounding. A message that
cannot be batched (w_g is to be trained, layers of one's own, another device, a config that is
refused) is left to be answered one by one, where its errors are raised as usual.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from flwr.app import Context, Message, RecordDict

from client_app.cohort import Member, Teacher, can_train_together, train_cohort
from client_app.participant import Participant
from common import wire
from common.codec import Float32
from common.errors import MHpFedHNError
from common.wire import Evaluation, TrainTask


@dataclass(frozen=True)
class _Ready:
    """A client that can join a batched call."""

    place: int
    participant: Participant
    task: TrainTask
    teacher_theta: Float32 | None

    @property
    def kind(self) -> Hashable:
        """What clients must have in common to be trained by one call."""
        data = self.participant.data
        looks = (*data.mean.tolist(), *data.std.tolist(), tuple(data.train_images.shape[1:]))
        sent = None if self.teacher_theta is None else sha256(self.teacher_theta.data).digest()
        return self.participant.kind, self.task.training, looks, sent, self.task.distill


def answer_together(pairs: Sequence[tuple[Message, Context]]) -> list[RecordDict | None]:
    """Answer `train.personal` messages; None stands where the caller has to do it one by one."""
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
    if message.metadata.message_type != wire.TRAIN_PERSONAL:
        return None
    try:
        participant = Participant.open(context)
        if participant.config.is_baseline:
            return None
        source = f"{wire.TRAIN_PERSONAL} message to client {participant.client_id}"
        task = wire.decode_train_task(message.content, source)
        teacher_theta = participant.teacher_theta(task, source)
    except MHpFedHNError:
        return None  # raised again, and reported, when it is answered by itself
    module = participant.module
    fits = task.theta is not None and task.theta.size == sum(p.numel() for p in module.parameters())
    if task.train_global or not fits or not can_train_together(module):
        return None
    return _Ready(place, participant, task, teacher_theta)


def _teacher(ready: _Ready) -> Teacher | None:
    if ready.teacher_theta is None or ready.task.distill is None:
        return None
    return Teacher(ready.participant.teacher(ready.task, ready.teacher_theta), ready.task.distill)


def _train(group: Sequence[_Ready]) -> list[RecordDict]:
    members: list[Member] = []
    evaluations: list[Evaluation | None] = []
    for ready in group:
        member, evaluation = ready.participant.join_cohort(ready.task)
        members.append(member)
        evaluations.append(evaluation)
    first = group[0]
    outcomes = train_cohort(
        first.participant.module, members, first.task.training, teacher=_teacher(first)
    )
    if first.participant.device.type == "cuda":
        torch.cuda.synchronize(first.participant.device)
    replies = []
    for ready, outcome, evaluation in zip(group, outcomes, evaluations, strict=True):
        reply = ready.participant.leave_cohort(ready.task, outcome, evaluation)
        precision, top_k = ready.task.header.precision, ready.participant.config.wire.uplink_top_k
        replies.append(wire.encode_train_reply(reply, precision, top_k=top_k))
    return replies
