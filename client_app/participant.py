"""One participant: what it declares, its data, what it keeps, and its reply to a message.

Imports torch; `app.py` decides in which process it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import Context, RecordDict
from torch import nn

from client_app.data.examples import ClientData, load_client_data
from client_app.data.partitions import WHOLE
from client_app.data.source import CLASSES
from client_app.models.building import AUTO, ModelKind, fitting
from client_app.models.instances import FlatModel, cpu_threads, pick_device
from client_app.models.registry import model_for_partition
from client_app.notices import take_notice
from client_app.personal import PersonalModel, accuracy_of
from client_app.privacy import Privacy, note_clear
from client_app.shelf import Shelf
from client_app.store import ClientState, FolderState, open_state, personal_folder
from client_app.training.early import train_to_best
from client_app.training.loop import Loss, Trained, train
from common.config import ClientSection, NodeConfig, RunConfig, TrainingSection, declared
from common.errors import ConfigError, DataError, WireError
from common.log import logger
from common.messages import Evaluation
from common.methods import METHODS, method_class
from common.records import Content, Received, encode

MOST_VERSIONS = 19
"""Of what a deployed participant keeps, whatever `checkpoint-every` its server has."""


def rate_of_round(section: TrainingSection, server_round: int, rounds: int) -> float:
    """Return the local rate in a round, 1 to `rounds`: along a cosine to `learning-rate-final`."""
    passed = min((server_round - 1) / max(rounds - 1, 1), 1.0)
    final = section.learning_rate_final
    return section.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * passed)) / 2)


@dataclass(frozen=True)
class Participant:
    """A client for the duration of one message: its declarations, its data, what it keeps."""

    client_id: str
    config: RunConfig
    section: ClientSection
    data: ClientData
    device: torch.device
    model_name: str
    state: ClientState
    node: NodeConfig

    @classmethod
    def open(cls, context: Context) -> Participant:
        """Read both configs, load the data, open the state; what the node declared wins.

        Raises ConfigError, DataError or ModelError where something declared cannot be used.
        """
        items = (*context.run_config.items(),), (*context.node_config.items(),)
        config, node, section, client_id = declared(*items)
        device = pick_device(section.device)
        state = open_state(context, section.state_dir, client_id)
        data = load_client_data(
            section,
            partition_id=node.partition_id,
            seed=config.run.seed,
            split_seed=split_seed_of(node, state),
            device=device,
        )
        info = METHODS[config.run.method]
        if info.of_classes and data.target != CLASSES:
            raise DataError(
                f"method {config.run.method!r} is for classes; {section.dataset} has "
                f"{data.target}. Use one that is not made of classes: mh-pfedhn-pg, fedavg."
            )
        return cls(
            client_id=client_id,
            config=config,
            section=section,
            data=data,
            device=device,
            model_name=model_for_partition(
                section.models, node.partition_id, section.num_partitions
            ),
            state=state,
            node=node,
        )

    def task(self, content: RecordDict) -> Received:
        """Check a message and forget what belongs to another federation than its own."""
        task, own = Received(content), self.config.run.method
        if task.header.method != own:
            raise WireError(f"it is of method {task.header.method!r:.80}; this run is {own!r}.")
        if self.is_deployed and isinstance(self.state, FolderState):
            Shelf(self.state.folder).require_same(task.header.federation_id, self.followed)
        self.state.enter_federation(task.header.federation_id)
        return task

    @property
    def followed(self) -> dict[str, Any]:
        """What of its examples this participant leaves to the run."""
        return self.node.followed(self.config.flat(), whole=self.section.partition == WHOLE)

    def in_round(self, section: TrainingSection, server_round: int) -> TrainingSection:
        """Give local training the rate of a round of this run.

        Raises ConfigError where a message asks for more than the participant's caps.
        """
        epochs, batch, node = section.local_epochs, section.batch_size, self.node
        if node.recipe or epochs > node.max_local_epochs or batch > node.max_batch_size:
            section = node.training(section)
        if self.privacy and self.is_deployed:
            declared = node.training(self.config.training).batch_size
            if section.batch_size != declared:
                raise ConfigError(
                    f"client {self.client_id}: a message asks for batch-size = {batch}; the run "
                    f"config has {declared}, and every other is one more in the ledger."
                )
        rate = rate_of_round(section, server_round, self.config.run.rounds)
        return section.model_copy(update={"learning_rate": rate})

    def kind_of(self, name: str, role: str = "personal") -> ModelKind:
        """Return the kind of a model for these data, this device and this run."""
        generate = self.node.generate if role == "personal" else ""
        kind = kind_for(name, self.data, device=self.device, generate=generate)
        return replace(kind, role=role, seed=self.config.run.seed)

    @property
    def privacy(self) -> Privacy | None:
        """How this participant trains privately, None where it does not."""
        s, most = self.section, self.node.max_epsilon
        if not s.dp_noise:
            return None
        count, single = self.data.num_train, self.is_deployed
        return Privacy(s.dp_noise, s.dp_clip, count, self.state, most, single=single)

    def require_private(self, module: nn.Module) -> None:
        """Raise ModelError or ConfigError where private training is asked and cannot be."""
        if self.privacy:
            self.privacy.require_fit(module)

    @property
    def tells_counts(self) -> bool:
        """Whether the server is told what the held-back examples say of a model.

        Not by a deployed participant that trains privately: weights that a server chooses would
        read those examples out, without any epsilon. Simulated clients are there to be measured.
        """
        return not (self.section.dp_noise and self.node.client_id)

    def train(
        self,
        model: FlatModel,
        section: TrainingSection,
        *,
        generator: torch.Generator,
        loss: Loss | None = None,
        clip: bool = True,
        leaves: bool = True,
    ) -> Trained:
        """Train in place as `training.loop.train`, or privately where that is declared.

        What never leaves this participant, in any form, spends nothing.
        """
        if privacy := self.privacy:
            return privacy.train(model, self.data, section, loss, leaves=leaves)
        fit = train_to_best if section.local_patience else train
        return fit(model, self.data, section, generator=generator, loss=loss, clip=clip)

    def note_release(self) -> None:
        """Write down, where there is a folder to do it in, that something leaves without noise."""
        if isinstance(self.state, FolderState) and not self.privacy:
            note_clear(self.state)

    @property
    def is_deployed(self) -> bool:
        """Whether this is a participant of its own, and no simulated client."""
        return bool(self.node.client_id)

    @property
    def keeps_models(self) -> bool:
        """Whether every model that comes is kept: where this is deployed, and has a folder."""
        return self.is_deployed and isinstance(self.state, FolderState)

    def told(self, found: Evaluation, server_round: int) -> Evaluation | None:
        """Return what of a test the server is told; a deployed participant's log has it all."""
        if self.is_deployed:
            words = "round %d: client %s as received, of %d test examples: %s"
            logger.info(words, server_round, self.client_id, found.num_test, found)
        return found if self.tells_counts else None

    def keep(
        self, module: nn.Module, found: Evaluation, task: Received, *, program: bool = False
    ) -> None:
        """Keep a model that came, with what it reaches: it is this participant's own."""
        assert isinstance(self.state, FolderState)
        header, data = task.header, self.data
        validation = accuracy_of(module, data.validation_batches(256))
        facts = {
            "federation": header.federation_id,
            "method": header.method,
            "round": header.server_round,
            "validation_accuracy": validation,
            "num_validation": len(data.validation_labels),
            "run_ended": program,
            "followed": self.followed,
        }
        model = self._personal(module, found, facts)
        try:
            shelf = Shelf(self.state.folder)
            shelf.keep(model, header.federation_id, header.server_round, program=program)
        except OSError as error:  # a full disk costs this version, not the round
            logger.error("the model of round %d is not kept: %s", header.server_round, error)

    @property
    def keeps_rounds(self) -> int:
        """For how many rounds a version of what is kept stays; a server asks for so many at most.

        Twice `checkpoint-every`: the newest checkpoint may turn out to be damaged.
        """
        rounds = 2 * self.config.run.checkpoint_every
        return min(rounds, MOST_VERSIONS) if self.node.client_id else rounds

    def store(self, module: nn.Module, evaluation: Evaluation) -> str:
        """Store the own model with the weights that it holds now; return their path.

        A deployed participant tells the name of the file alone. Without a state folder they go
        below the run's output folder; "" without either.
        """
        folder = personal_folder(self.state, self.config.run.output_dir, self.client_id)
        if folder is None:
            return ""
        path = self._personal(module, evaluation, {}).store(folder, program=self.exports)
        return path.name if self.is_deployed else str(path)

    def _personal(
        self, module: nn.Module, evaluation: Evaluation, facts: dict[str, Any]
    ) -> PersonalModel:
        facts |= self.privacy.facts() if self.privacy else {}
        common = self.kind_of(self.config.distill.global_model).name
        return PersonalModel(self.model_name, module, self.data, evaluation, common, facts)

    @property
    def exports(self) -> bool:
        """Whether the personal model gets a program: that takes seconds, where many simulate."""
        return isinstance(self.state, FolderState)


def split_seed_of(node: NodeConfig, state: ClientState) -> int | None:
    """Return what divides a participant's examples; None: the run's seed, where it is simulated.

    A server that chose the division could train on what another run holds back.
    """
    if node.split_seed >= 0:
        return node.split_seed
    return state.split_seed() if node.client_id and isinstance(state, FolderState) else None


def kind_for(name: str, data: ClientData, *, device: torch.device, generate: str = "") -> ModelKind:
    """Return the kind of a model for some data; "auto" is what fits their shape."""
    shape, dtype = data.input_shape, data.input_dtype
    if name == AUTO:
        is_floats = dtype.is_floating_point
        name = fitting(shape, is_pictures=data.is_pictures, is_floats=is_floats)
    sizes = (data.in_channels, data.num_classes)
    inputs = tuple((part, tuple(is_a)) for part, is_a in data.about.get("inputs", {}).items())
    return ModelKind(name, *sizes, device, "personal", 0, shape, dtype, generate, inputs)


def reply_to(message_type: str, content: RecordDict, context: Context) -> RecordDict:
    """Do what one message of the server asks, whatever the method; return the reply's content.

    Raises MHpFedHNError where configuration, data, model or message cannot be used.
    """
    return answer(Participant.open(context), message_type, content)


def answer(participant: Participant, message_type: str, content: RecordDict) -> RecordDict:
    """Do what one message asks of a participant; return the reply's content."""
    with cpu_threads(participant.section.client_threads):
        try:
            task = participant.task(content)
            if message_type.startswith("query.") and take_notice(
                participant.state, message_type, task
            ):
                return encode(task.header, Content({}))
            method = method_class(participant.config.run.method, "client_app")(participant)
            reply = method.reply(message_type, task)
        except WireError as error:
            source = f"{message_type} message to client {participant.client_id}"
            raise WireError(f"{source}: {error}") from error
    return encode(task.header, reply, top_k=participant.config.wire.uplink_top_k)
