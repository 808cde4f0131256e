"""MH-pFedHN and MH-pFedHNGD on the client (arXiv 2507.22330): train what was generated for it.

The change goes back; BatchNorm statistics stay. With GD the client also trains a copy of the global
model w_g, and distils from w_g as it was sent. With PG that is a common model of its own, and the
client predicts with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from client_app.methods.base import Method
from client_app.models.building import ModelKind
from client_app.models.instances import FlatModel, Instance, instance_of, offset_theta
from client_app.predictor import (
    Logits,
    choose_predictor,
    evaluate_both,
    judge_both,
    teaching_weight,
)
from client_app.store import BUFFER, Residual, buffers_of, largest_with_residual, save_finite
from client_app.training.batched import Member, Outcome
from client_app.training.loop import Loss, Teacher, Trained, delta, judged, logits_over
from common.compression import Float32
from common.config import DistillSection
from common.errors import WireError
from common.messages import (
    ALONE,
    DELTA,
    DISTIL,
    GLOBAL_DELTA,
    GLOBAL_THETA,
    THETA,
    TRAIN_GLOBAL,
    Evaluation,
)
from common.records import Arrays, Received
from common.seeding import stream_seed

TEACHER = "teacher"


@dataclass(frozen=True)
class Role:
    """One of the two models that a client trains.

    `theta` and `delta` are its vectors in messages; under `buffers` and `left_out` the client keeps
    what stays here; `clip` says whether the gradient's norm is clipped.
    """

    theta: str
    delta: str
    buffers: str
    shuffle: str
    left_out: str
    clip: bool


PERSONAL = Role(THETA, DELTA, "personal_buffers", "shuffle", "left_out", clip=True)
GLOBAL = Role(
    GLOBAL_THETA, GLOBAL_DELTA, "global_buffers", "shuffle-global", "global_left_out", clip=False
)
"""w_g is trained without clipping (method.md, Phase 1)."""
APART = Role("", "", ALONE, "shuffle", "", clip=True)
"""The model trained alone: neither comes nor goes."""


class MHpFedHN(Method):
    """Trains the personal model and, with GD, w_g: in one message or in two.

    `predicts_with` are the models that a client predicts with.
    """

    predicts_with: ClassVar[tuple[Role, ...]] = (PERSONAL,)

    # --- the hops --------------------------------------------------------------------------------

    def ready(self, task: Received, *, before: int) -> Instance:
        """Load what was generated: the personal model, or w_g where the message is w_g's alone."""
        return self._ready(self.roles(task)[-1], task, before)

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train w_g where asked, then the personal model where it came."""
        *before, last = self.roles(task)
        now, seconds = task.header.server_round, 0.0
        for role in before:
            seconds += self._train(role, task, self._ready(role, task, now)).seconds
        trained = self._train(last, task, instance)
        return replace(trained, seconds=seconds + trained.seconds)

    def keep(self, task: Received, instance: Instance) -> None:
        """Keep BatchNorm statistics, and w_g as sent where the personal model comes later."""
        for role in self.roles(task):
            self.keep_buffers(role, task, instance_of(self.kind_of(role)).buffers())

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Return the changes, before minus after."""
        sent_up = {}
        for role in self.roles(task):
            model = instance_of(self.kind_of(role)).model
            start = self.placed(role, self.start(role, task))
            change: Float32 = delta(start, model.theta.detach()).cpu().numpy()
            sent_up[role.delta] = self.sent_up(role, task, change)
        return sent_up

    # --- also used where several clients are trained at once -------------------------------------

    def roles(self, task: Received) -> list[Role]:
        """Return what a message is about, the personal model last."""
        found = [GLOBAL] if task.flag(TRAIN_GLOBAL) else []
        return [*found, PERSONAL] if THETA in task or not found else found

    def start(self, role: Role, task: Received) -> Float32:
        """Return the generated theta (P,) of one of the models."""
        return task.vector(role.theta, instance_of(self.kind_of(role)).model.num_parameters)

    def placed(self, role: Role, thetas: Float32) -> Tensor:
        """Return the weights (..., P) that generated thetas stand for, on the device.

        Under the kernel rule they are the model's own initialisation plus theta. The server learns
        nothing new from it: who has the same architecture has the same offset. Several clients of
        one architecture may come in one transfer.
        """
        received = torch.from_numpy(thetas).to(self.participant.device)
        if not self.participant.config.adds_init:
            return received
        seed, kind = self.participant.config.run.seed, self.kind_of(role)
        return received + offset_theta(kind, stream_seed(seed, "theta-offset"))

    def keep_buffers(self, role: Role, task: Received, buffers: dict[str, Tensor]) -> None:
        """Keep a model's buffers; where w_g came alone, also w_g for the message that follows."""
        state = self.participant.state
        kept = {BUFFER + name: x for name, x in buffers.items()}
        save_finite(state, role.buffers, kept, self.stamp(task))
        if THETA not in task:
            theta, now = torch.from_numpy(self.start(GLOBAL, task)), task.header.server_round
            state.save(TEACHER, {"theta": theta, "round": torch.tensor(now)})

    def sent_up(self, role: Role, task: Received, change: Float32) -> Float32:
        """Return what of a change (P,) goes up: with top-k its largest entries, 0 elsewhere."""
        top_k = self.participant.config.wire.uplink_top_k
        if top_k == 1:
            return change
        residual = Residual(self.participant.state, role.left_out, self.stamp(task))
        precision = task.header.precision
        return largest_with_residual(change, residual, top_k=top_k, precision=precision)

    def teacher_theta(self, task: Received) -> Float32 | None:
        """Return w_g (K_g,) as sent in this message, or earlier in this round; None without."""
        if GLOBAL_THETA in task:
            return self.start(GLOBAL, task)
        if not task.flag(DISTIL):
            return None
        kept = self.participant.state.load(TEACHER)
        if kept is None or int(kept["round"]) != task.header.server_round:
            raise WireError(
                f"there is no teacher for round {task.header.server_round}. The server sends w_g "
                "to clients that did not train it; give this client a state-dir if it restarts "
                "within a round."
            )
        theta: Float32 = kept["theta"].numpy()
        return theta

    def teacher(self, theta: Float32, task: Received) -> FlatModel:
        """Return this thread's teacher with the weights theta (K_g,)."""
        instance = instance_of(replace(self.global_kind, role="teacher"))
        instance.reset(None, 0)
        instance.model.load(self.placed(GLOBAL, theta))
        return instance.model

    def judge(self, seen: Mapping[Role, Logits], started: float) -> Evaluation:
        """Test what the client predicts with, by what its models say; begun at `started`."""
        return judged(*seen[PERSONAL], self.data, started)

    def member_alone(self, task: Received) -> Member:
        """Hand over what a batched call needs to test or train the model trained alone."""
        instance = self._ready_alone(task, before=task.header.server_round)
        device = self.participant.device
        return Member(
            theta=instance.model.theta.detach().clone(),
            buffers=instance.buffers(),
            data=self.data,
            generator=self.shuffler(APART.shuffle, task),
            dropout=torch.Generator(device).manual_seed(self.dropout_seed(Method.own, task)),
        )

    def keep_alone(self, task: Received, outcome: Outcome) -> None:
        """Keep the model that a batched call trained alone."""
        instance = instance_of(self.kind_of(APART))
        instance.reset(outcome.buffers, 0)
        instance.model.load(outcome.theta)
        self.save(ALONE, task, instance, theta=True)

    def member(self, role: Role, task: Received, placed: Tensor) -> Member:
        """Hand over what a batched call needs to test or train one of the client's models.

        `placed` (P,) are its weights on the device.
        """
        instance, device = instance_of(self.kind_of(role)), self.participant.device
        kept = self.participant.state.load(role.buffers, before=task.header.server_round) or {}
        return Member(
            theta=placed,
            buffers=instance.fitting(buffers_of(kept)),
            data=self.data,
            generator=self.shuffler(role.shuffle, task),
            dropout=torch.Generator(device).manual_seed(self.dropout_seed(role.buffers, task)),
        )

    def kind_of(self, role: Role) -> ModelKind:
        """What the construction of one of the models depends on."""
        if role is APART:
            return replace(self.kind, role=ALONE)
        return self.kind if role is PERSONAL else self.global_kind

    # --- how -------------------------------------------------------------------------------------

    def _ready(self, role: Role, task: Received, before: int) -> Instance:
        """Make a borrowed model this client's: its buffers, its dropout, its weights."""
        instance = instance_of(self.kind_of(role))
        self.load(role.buffers, task, instance, before=before)
        instance.model.load(self.placed(role, self.start(role, task)))
        return instance

    def _train(self, role: Role, task: Received, instance: Instance) -> Trained:
        return self.participant.train(
            instance.model,
            self.training(task),
            generator=self.shuffler(role.shuffle, task),
            loss=self._loss(task) if role is PERSONAL else None,
            clip=role.clip,
        )

    def _loss(self, task: Received) -> Loss | None:
        theta = self.teacher_theta(task)
        if theta is None or not task.flag(DISTIL):
            return None
        teacher, section = self.teacher(theta, task), task.section(DistillSection)
        models = (instance_of(self.kind).model, teacher)
        said = (logits_over(model, self.data, validation=True) for model in models)  # if needed
        alpha = self.teaching_weight(section.distill_alpha, lambda: said)
        return Teacher(teacher.module, alpha, section.distill_temperature) if alpha else None

    def teaching_weight(self, most: float, said: Callable[[], Iterable[Tensor]]) -> float:
        """Return the teacher's weight, up to `most`; `said`: both models' validation logits."""
        return most


class MHpFedHNPG(MHpFedHN):
    """Trains both models that came; predicts with what the validation examples prefer."""

    predicts_with = (PERSONAL, GLOBAL)

    def ready(self, task: Received, *, before: int) -> Instance:
        """Load both models, each with its own statistics; return the own one."""
        self._ready(GLOBAL, task, before)
        return super().ready(task, before=before)

    def teacher(self, theta: Float32, task: Received) -> FlatModel:
        """Return the teacher with the statistics of this client's common model."""
        model = super().teacher(theta, task)
        instance = instance_of(replace(self.global_kind, role="teacher"))
        self.load(GLOBAL.buffers, task, instance, before=task.header.server_round)
        return model

    def teaching_weight(self, most: float, said: Callable[[], Iterable[Tensor]]) -> float:
        """Measure on the validation examples how much better the teacher is, before training.

        None teaches where training is private: what those examples say would leave with the delta.
        """
        if self.participant.privacy:
            return 0.0
        own, common = said()
        return teaching_weight(own, common, self.data.validation_labels, most=most)

    def measure(self, task: Received, instance: Instance) -> Evaluation:
        """Test the own model, the common model and the predictor."""
        return evaluate_both(instance.model, instance_of(self.global_kind).model, self.data)

    final = measure

    def owned(self, instance: Instance) -> nn.Module:
        """Return the predictor."""
        common = instance_of(self.global_kind).model
        return choose_predictor(instance.model, common, self.data)

    def judge(self, seen: Mapping[Role, Logits], started: float) -> Evaluation:
        """Test the own model, the common model and the predictor."""
        return judge_both((seen[role] for role in self.predicts_with), self.data, started)
