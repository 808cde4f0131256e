"""The client half of a method: what it receives, how it trains, what it keeps and what it sends.

A message to train passes hops, each of which a method may replace: `receive` -> `fit` -> `keep` ->
`collect`; and `measure` for the test. What is not replaced is Local: one's own model, trained as
every method trains, of which nothing travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from client_app.methods.features import Head, head_of, require_head_is_last
from client_app.models.building import ModelKind, architecture_tag, draw_theta, opaque
from client_app.models.instances import Instance, instance_of
from client_app.participant import Participant
from client_app.program import EXPORTING
from client_app.store import BUFFER, Stamp, buffers_of, save_finite
from client_app.training.loop import Loss, Trained, evaluate, logits_over, num_correct
from common.compression import Float32
from common.config import TrainingSection
from common.errors import WireError, unknown_name
from common.messages import (
    ALONE,
    EVALUATE,
    EVALUATE_FIRST,
    FINISH,
    LOCATION,
    REGISTER,
    THETA,
    TRAIN,
    TRAIN_GLOBAL,
    Evaluation,
    Registration,
    TrainReply,
)
from common.records import Arrays, Content, Received
from common.seeding import stream_seed, torch_generator


class Method:
    """One method on one client, for the duration of one message.

    Attributes
    ----------
    own : name under which the client keeps its own model.
    keeps_theta : whether that model's weights stay here from round to round; buffers (BatchNorm
        statistics) always do.
    """

    own: ClassVar[str] = "own_model"
    keeps_theta: ClassVar[bool] = True

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        self.data = participant.data
        self.settings = participant.config.baseline
        joins = participant.config.run.method != "local"
        self.trains_alone = joins and participant.section.measure_alone

    # --- a message -------------------------------------------------------------------------------

    def reply(self, message_type: str, task: Received) -> Content:
        """Do what a message asks; raise WireError where there is none of this type."""
        handlers = {
            REGISTER: self._reply_register,
            TRAIN: self._reply_train,
            EVALUATE: self._reply_evaluate,
            FINISH: self._reply_finish,
        }
        if message_type not in handlers:
            raise WireError(unknown_name("message type", message_type, handlers))
        content = handlers[message_type](task)
        if message_type in (TRAIN, EVALUATE):
            self.participant.note_release()
        return content

    def _reply_register(self, task: Received) -> Content:
        return Content(self.declare().settings())

    def _reply_train(self, task: Received) -> Content:
        """Test what came, where asked; train it, keep what stays here, send the rest."""
        now, asked = task.header.server_round, task.flag(EVALUATE_FIRST)
        is_personal = THETA in task or not task.flag(TRAIN_GLOBAL)
        tests = asked or (is_personal and self.participant.keeps_models)
        found = self._told(task, before=now) if tests else None
        if self.trains_alone and is_personal:
            alone = self._ready_alone(task, before=now)
            self.train(task, alone, leaves=self.participant.tells_counts)
            self.save(ALONE, task, alone, theta=True)
        instance = self.ready(task, before=now)
        trained = self.fit(task, instance)
        self.keep(task, instance)
        reply = TrainReply(
            trained.num_examples, trained.loss, trained.seconds, found if asked else None
        )
        if privacy := self.participant.privacy:
            reply = privacy.stated(reply, f"round {now}: client {self.participant.client_id}")
        return Content(reply.settings(), self.collect(task, instance))

    def _reply_evaluate(self, task: Received) -> Content:
        found = self._told(task, before=task.header.server_round + 1)
        return Content(found.settings() if found else {})

    def _told(self, task: Received, *, before: int) -> Evaluation | None:
        """Test what came, and keep it; return what of it the server is told."""
        instance = self.ready(task, before=before)
        found = self._beside_alone(self.measure(task, instance), task)
        if self.participant.keeps_models:
            self.participant.keep(self.owned(instance), found, task)
        return self.participant.told(found, task.header.server_round)

    def _reply_finish(self, task: Received) -> Content:
        """Store the personal model, and say where."""
        with EXPORTING if self.participant.exports else nullcontext():
            instance = self.ready(task, before=task.header.server_round + 1)
            self.adapt(task, instance)
            found = self._beside_alone(self.final(task, instance), task)
            if self.participant.keeps_models:
                self.participant.keep(self.owned(instance), found, task, program=True)
            return Content({LOCATION: self.participant.store(self.owned(instance), found)})

    # --- the hops --------------------------------------------------------------------------------

    def receive(self, task: Received, instance: Instance) -> None:
        """Overwrite a part or all of the own model with what came; raise WireError if bad."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train the model in place."""
        return self.train(task, instance)

    def keep(self, task: Received, instance: Instance) -> None:
        """Keep what later rounds need, on this client alone."""
        self.save(self.own, task, instance, theta=self.keeps_theta)

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Return what goes up after training."""
        return {}

    def measure(self, task: Received, instance: Instance) -> Evaluation:
        """Test the model as it is after `receive`."""
        return evaluate(instance.model, self.data)

    def adapt(self, task: Received, instance: Instance) -> None:
        """Make the model what this client will use from now on (finish)."""

    final = measure  # of what this client will use from now on (finish)

    def owned(self, instance: Instance) -> nn.Module:
        """Return what this client will use from now on (finish)."""
        return instance.model.module

    # --- alone: the same model by the same recipe, of which the server sees one count ------------

    def _beside_alone(self, found: Evaluation, task: Received) -> Evaluation:
        """Add what the model trained alone gets right, where there is one."""
        if not self.trains_alone:
            return found
        before = task.header.server_round + (not task.flag(EVALUATE_FIRST))
        model = self._ready_alone(task, before=before).model
        correct = num_correct(logits_over(model, self.data), self.data.test_labels)
        return replace(found, others={**found.others, ALONE: correct})

    def _ready_alone(self, task: Received, *, before: int) -> Instance:
        instance = instance_of(replace(self.kind, role=ALONE))
        kept = self.load(ALONE, task, instance, before=before, drops_as=Method.own)
        self.load_theta(instance, kept)
        return instance

    # --- around them -----------------------------------------------------------------------------

    def declare(self) -> Registration:
        """Say who this is, how large its model is, and what else the method needs to know."""
        participant, needs = self.participant, self.participant.config.needs
        instance, feature_dim, group = instance_of(self.kind), 0, ""
        participant.require_private(instance.model.module)
        num_classes = self.data.num_classes if "num_classes" in needs else 0
        if "feature_dim" in needs:
            images = self.data.normalise(self.data.test_images[:2])
            head = require_head_is_last(instance.model.module, images, num_classes)
            feature_dim = head.layer.in_features
        if "group" in needs:
            declared = "" if participant.config.is_baseline else participant.node.head_tag
            group = opaque(declared) if declared else architecture_tag(instance.model.module)
        shared_size = 0
        if "num_global_parameters" in needs:
            shared = instance_of(self.global_kind).model
            participant.require_private(shared.module)
            shared_size = shared.num_parameters
        return Registration(
            client_id=participant.client_id,
            num_parameters=instance.model.num_parameters,
            num_examples=self.data.num_train,
            num_global_parameters=shared_size,
            group=group,
            num_classes=num_classes,
            feature_dim=feature_dim,
        )

    def ready(self, task: Received, *, before: int) -> Instance:
        """Load the own model of a round earlier than `before`, or its first weights, and receive.

        Raises WireError where the message does not hold what this method's server sends.
        """
        instance = instance_of(self.kind)
        kept = self.load(self.own, task, instance, before=before)
        if self.keeps_theta or THETA not in task:
            self.load_theta(instance, kept)
        self.receive(task, instance)
        return instance

    def load(
        self, name: str, task: Received, instance: Instance, *, before: int, drops_as: str = ""
    ) -> Mapping[str, Tensor]:
        """Give a model its kept buffers, or fresh ones, and seed its dropout."""
        kept: Mapping[str, Tensor] = self.participant.state.load(name, before=before) or {}
        instance.reset(buffers_of(kept), self.dropout_seed(drops_as or name, task))
        return kept

    def dropout_seed(self, name: str, task: Received) -> int:
        """Return the seed of what a model drops in this round."""
        who, seed = self.participant.client_id, self.participant.config.run.seed
        return stream_seed(seed, f"dropout/{name}", task.header.server_round, who)

    def load_theta(
        self, instance: Instance, kept: Mapping[str, Tensor], purpose: str = "first-theta"
    ) -> None:
        """Load kept weights; what is missing or of another size starts as drawn for a purpose.

        The first weights are the same for all clients of one architecture.
        """
        theta = kept.get(THETA)
        if theta is None or theta.shape != instance.model.theta.shape:
            seed = stream_seed(self.participant.config.run.seed, purpose)
            theta = draw_theta(instance.kind, seed)
        instance.model.load(theta.to(self.participant.device))

    def save(self, name: str, task: Received, instance: Instance, *, theta: bool) -> None:
        """Keep a model's buffers, and its weights where asked, for later rounds."""
        kept = {BUFFER + key: x for key, x in instance.buffers().items()}
        if theta:
            kept[THETA] = instance.model.theta.detach()
        save_finite(self.participant.state, name, kept, self.stamp(task))

    def stamp(self, task: Received) -> Stamp:
        """Return the stamp of what is kept now."""
        return Stamp(task.header.server_round, self.participant.keeps_rounds)

    def train(
        self, task: Received, instance: Instance, loss: Loss | None = None, *, leaves: bool = True
    ) -> Trained:
        """Train as every method does; with a loss of the method's own, if any."""
        section, generator = self.training(task), self.shuffler("shuffle", task)
        return self.participant.train(
            instance.model, section, generator=generator, loss=loss, leaves=leaves
        )

    def training(self, task: Received) -> TrainingSection:
        """Return how a message wants local training, at the rate of its round."""
        now = task.header.server_round
        return self.participant.in_round(task.section(TrainingSection), now)

    def shuffler(self, purpose: str, task: Received) -> torch.Generator:
        """Make the generator that shuffles the examples; every method draws the same orders."""
        who, seed = self.participant.client_id, self.participant.config.run.seed
        now = task.header.server_round
        return torch_generator(seed, purpose, server_round=now, client_id=who)

    def head(self, instance: Instance) -> Head:
        """Find the own model's head."""
        return head_of(instance.model.module, self.data.num_classes)

    def vector(self, task: Received, name: str, length: int) -> Tensor:
        """Read a received vector (length,) on the device."""
        return torch.from_numpy(task.vector(name, length)).to(self.participant.device)

    @property
    def kind(self) -> ModelKind:
        """What the construction of the own model depends on."""
        return self.participant.kind_of(self.participant.model_name)

    @property
    def global_kind(self) -> ModelKind:
        """What the construction of the model that all clients share depends on."""
        return self.participant.kind_of(self.participant.config.distill.global_model, "global")


class Local(Method):
    """Everything as the base has it."""


def as_array(x: Tensor) -> Float32:
    """Copy a vector off the device, to be sent."""
    array: Float32 = x.detach().cpu().numpy().copy()
    return array
