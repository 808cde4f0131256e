"""Train several clients of one round in batched calls (in-process engine).

All models of one architecture and role (own, common, trained alone) are one call, whoever's they
are. What a client sends and keeps is what it would by itself, up to float rounding. A message that
cannot be batched (layers of one's own, a baseline, a config that is refused) is left to be handled
by itself, where its errors are raised as usual.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from torch import nn

from client_app.data.losses import Weighted
from client_app.methods.mhpfedhn import APART, GLOBAL, PERSONAL, MHpFedHN, Role
from client_app.models.instances import instance_of
from client_app.participant import Participant
from client_app.predictor import Logits
from client_app.training.batched import Member, Outcome, can_train_together, train_cohort
from client_app.training.batched_evaluation import cohort_logits
from client_app.training.loop import delta, num_correct
from client_app.training.teachers import Teachers
from common.compression import Float32
from common.config import DistillSection
from common.errors import MHpFedHNError
from common.messages import ALONE, DISTIL, EVALUATE_FIRST, TRAIN, Evaluation, TrainReply
from common.methods import method_class
from common.records import Content, Received, encode


@dataclass
class _Ready:
    """A client that can join batched calls, and what they found for it.

    `trains` are the models that came, in the order in which it trains them; `teacher` is the common
    model as it was sent, if it came.
    """

    position: int
    method: MHpFedHN
    task: Received
    trains: list[Role]
    teacher: Float32 | None
    seen: dict[Role, Logits] = field(default_factory=dict)
    outcomes: dict[Role, Outcome] = field(default_factory=dict)
    changes: dict[Role, Float32] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    @classmethod
    def open(cls, position: int, message: Message, context: Context) -> _Ready | None:
        """Read a message; None where it has to be handled by itself."""
        if message.metadata.message_type != TRAIN:
            return None
        try:
            participant = Participant.open(context)
            if participant.config.is_baseline or participant.privacy is not None:
                return None
            task = participant.task(message.content)
            method = method_class(participant.config.run.method, "client_app")(participant)
            ready = cls(position, method, task, method.roles(task), method.teacher_theta(task))
            return ready if ready.fits() else None
        except MHpFedHNError:
            return None  # raised again, and reported, when the client trains by itself

    @property
    def roles(self) -> list[Role]:
        """All models that it trains in this message."""
        apart = self.method.trains_alone and PERSONAL in self.trains
        return [*self.trains, APART] if apart else self.trains

    @property
    def tests(self) -> bool:
        """Whether what came is tested first."""
        return self.task.flag(EVALUATE_FIRST)

    def fits(self) -> bool:
        """Whether all that it trains and learns from can be batched."""
        data, training = self.method.data, self.method.training(self.task)
        own_loss = data.loss and not isinstance(data.loss, Weighted)
        if own_loss or data.augment or training.local_patience:
            return False
        needed = self.roles if self.teacher is None else [*self.roles, GLOBAL]
        modules = (instance_of(self.method.kind_of(role)).model.module for role in needed)
        return all(map(can_train_together, modules))

    def kind(self, role: Role) -> Hashable:
        """What models of a role must have in common to be trained by one call."""
        task, participant = self.task, self.method.participant
        training, distil = self.method.training(task), task.flag(DISTIL)
        section = task.section(DistillSection) if distil and role is PERSONAL else None
        alike = (training, section, self.teacher is None, self.tests, participant.data.loss is None)
        looks = (*participant.data.looks, participant.config.adds_init)
        return role, self.method.kind_of(role), alike, looks

    def judge(self, seconds: float) -> None:
        """Make the evaluation of what its models say, which took so long."""
        tested = self.method.judge(self.seen, time.monotonic())
        others = dict(tested.others)
        if APART in self.seen:
            others[ALONE] = num_correct(self.seen[APART].test, self.method.data.test_labels)
        self.evaluation = replace(tested, others=others, seconds=seconds)

    def teaching_weight(self, most: float) -> float:
        """Return the weight of its teacher, by what both models say."""
        said, models = self.seen, self.method.predicts_with
        return self.method.teaching_weight(most, lambda: (said[r].validation for r in models))

    def reply(self) -> RecordDict:
        """Keep what stays and return what goes up."""
        method, task, arrays = self.method, self.task, {}
        if APART in self.outcomes:
            method.keep_alone(task, self.outcomes[APART])
        for role in self.trains:
            method.keep_buffers(role, task, self.outcomes[role].buffers)
            arrays[role.delta] = method.sent_up(role, task, self.changes[role])
        last = self.outcomes[self.trains[-1]].trained
        reply = TrainReply(
            num_examples=last.num_examples,
            train_loss=last.loss,
            seconds=sum(self.outcomes[role].trained.seconds for role in self.trains),
            evaluation=self.evaluation,
        )
        top_k = method.participant.config.wire.uplink_top_k
        return encode(task.header, Content(reply.settings(), arrays), top_k=top_k)


def reply_together(pairs: Sequence[tuple[Message, Context]]) -> list[RecordDict | None]:
    """Return replies to training messages; None where the caller has to do it one by one."""
    groups: dict[Hashable, list[tuple[_Ready, Role]]] = {}
    for position, pair in enumerate(pairs):
        if ready := _Ready.open(position, *pair):
            for role in ready.roles:
                groups.setdefault(ready.kind(role), []).append((ready, role))
    shared = {r.position: r for group in groups.values() if len(group) > 1 for r, _ in group}
    cohorts = [
        _Cohort([ready for ready, _ in group], group[0][1])
        for group in groups.values()
        if group[0][0].position in shared
    ]
    started = time.monotonic()
    for cohort in cohorts:
        cohort.look()
    seconds = (time.monotonic() - started) / max(len(shared), 1)
    for ready in shared.values():
        if ready.tests and ready.seen:
            ready.judge(seconds)
    for cohort in cohorts:
        cohort.train()
    return [shared[i].reply() if i in shared else None for i in range(len(pairs))]


class _Cohort:
    """One model of each of several clients: same role, same architecture.

    Their weights go to the device, and their deltas come from there, in one transfer each.
    """

    def __init__(self, clients: Sequence[_Ready], role: Role) -> None:
        self._clients, self._role, self._first = clients, role, clients[0]
        self._members = self._hand_over()

    @property
    def _module(self) -> nn.Module:
        return instance_of(self._first.method.kind_of(self._role)).model.module

    def _hand_over(self) -> list[Member]:
        if self._role is APART:
            return [r.method.member_alone(r.task) for r in self._clients]
        starts = np.stack([r.method.start(self._role, r.task) for r in self._clients])
        placed = self._first.method.placed(self._role, starts)
        both = zip(self._clients, placed, strict=True)
        return [r.method.member(self._role, r.task, theta) for r, theta in both]

    def look(self) -> None:
        """Let the models classify what they are tested and weighed on."""
        first, predictors = self._first, self._first.method.predicts_with
        if self._role not in (*predictors, APART):
            return
        validates = self._role is not APART and (first.tests or len(predictors) > 1)
        said = (
            cohort_logits(self._module, self._members, validation=part)
            if wanted
            else [torch.empty(0)] * len(self._clients)
            for part, wanted in ((False, first.tests), (True, validates))
        )
        for ready, *logits in zip(self._clients, *said, strict=True):
            ready.seen[self._role] = Logits(*logits)

    def train(self) -> None:
        """Train them, and note what became of them and how they changed."""
        section = self._first.method.training(self._first.task)
        outcomes = train_cohort(
            self._module,
            self._members,
            section,
            clip=self._role.clip,
            teachers=self._teachers() if self._role is PERSONAL else None,
        )
        for ready, outcome in zip(self._clients, outcomes, strict=True):
            ready.outcomes[self._role] = outcome
        if self._role is APART:
            return
        starts, trained = (torch.stack([x.theta for x in xs]) for xs in (self._members, outcomes))
        changes = delta(starts, trained).cpu().numpy()
        for ready, change in zip(self._clients, changes, strict=True):
            ready.changes[self._role] = change

    def _teachers(self) -> Teachers | None:
        """Return what they learn from: one common model, or everybody's own."""
        first, sent = self._first, [r.teacher for r in self._clients if r.teacher is not None]
        if not sent or not first.task.flag(DISTIL):
            return None
        section, thetas = first.task.section(DistillSection), np.stack(sent)
        shared = GLOBAL not in first.method.predicts_with and (thetas == thetas[0]).all()
        learn_from = zip(self._clients[:1] if shared else self._clients, sent, strict=False)
        states = [
            {k: x.clone() for k, x in r.method.teacher(theta, r.task).module.state_dict().items()}
            for r, theta in learn_from
        ]
        return Teachers(
            first.method.teacher(sent[0], first.task).module,
            {k: torch.stack([state[k] for state in states]) for k in states[0]},
            torch.tensor(
                [r.teaching_weight(section.distill_alpha) for r in self._clients],
                device=self._members[0].theta.device,
            ),
            section.distill_temperature,
        )
