"""One participant, and what it does with each kind of message, whatever the method.

Imports torch; `app.py` decides in which process it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import Context, RecordDict
from torch import nn

from client_app.data.examples import ClientData, load_client_data
from client_app.methods.base import Method
from client_app.models.registry import model_for_partition
from client_app.personal import PersonalModel
from client_app.store import ClientState, FolderState, open_state, personal_folder
from client_app.training.evaluation import evaluate
from client_app.workshop import cpu_threads, pick_device
from common.config import NodeConfig, RunConfig
from common.config.client import ClientSection
from common.errors import WireError, unknown_name
from common.messages import (
    EVALUATE,
    EVALUATE_FIRST,
    FINISH,
    LOCATION,
    REGISTER,
    TRAIN,
    Evaluation,
    TrainReply,
)
from common.methods import METHODS
from common.records import Content, Received, encode


def answer(message_type: str, content: RecordDict, context: Context) -> RecordDict:
    """Answer one message of the server.

    Raises
    ------
    MHpFedHNError
        The configuration, the data, the model or the message cannot be used.
    """
    participant = Participant.open(context)
    if message_type not in _HANDLERS:
        raise WireError(unknown_name("message type", message_type, _HANDLERS))
    with cpu_threads(participant.section.client_threads):
        try:
            task = participant.task(content)
            reply = _HANDLERS[message_type](participant.method(), task)
        except WireError as error:
            source = f"{message_type} message to client {participant.client_id}"
            raise WireError(f"{source}: {error}") from error
    return encode(task.header, reply, top_k=participant.config.wire.uplink_top_k)


def _register(method: Method, task: Received) -> Content:
    return Content(method.declare().settings())


def _train(method: Method, task: Received) -> Content:
    """Test what came, where that is asked for; train it, keep what stays here, send the rest."""
    now = task.header.server_round
    evaluation = None
    if task.flag(EVALUATE_FIRST):
        evaluation = method.measure(task, method.ready(task, before=now))
    tool = method.ready(task, before=now)
    trained = method.fit(task, tool)
    method.keep(task, tool)
    reply = TrainReply(trained.num_examples, trained.loss, trained.seconds, evaluation)
    return Content(reply.settings(), method.collect(task, tool))


def _evaluate(method: Method, task: Received) -> Content:
    tool = method.ready(task, before=task.header.server_round + 1)
    return Content(method.measure(task, tool).settings())


def _finish(method: Method, task: Received) -> Content:
    """Store the personal model as a plain torch state_dict, and say where."""
    tool = method.ready(task, before=task.header.server_round + 1)
    method.adapt(task, tool)
    evaluation = evaluate(tool.model, method.data)
    return Content({LOCATION: method.participant.store(tool.model.module, evaluation)})


_HANDLERS: dict[str, Callable[[Method, Received], Content]] = {
    REGISTER: _register,
    TRAIN: _train,
    EVALUATE: _evaluate,
    FINISH: _finish,
}


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
    head_tag: str = ""

    @classmethod
    def open(cls, context: Context) -> Participant:
        """Read both configs, load the data, open the state; what the node declared wins.

        Raises
        ------
        ConfigError, DataError, ModelError
            Something declared cannot be used; the message says what to change.
        """
        config = RunConfig.parse(context.run_config)
        node = NodeConfig.parse(context.node_config)
        section = node.client_section(config)
        device = pick_device(section.device)
        data = load_client_data(
            section, partition_id=node.partition_id, seed=config.run.seed, device=device
        )
        return cls(
            client_id=node.identity,
            config=config,
            section=section,
            data=data,
            device=device,
            model_name=model_for_partition(
                section.models, node.partition_id, section.num_partitions
            ),
            state=open_state(context, section.state_dir, node.identity),
            head_tag=node.head_tag,
        )

    def method(self) -> Method:
        """Return the client half of the run's method."""
        half: Method = METHODS[self.config.run.method].load("client_app")(self)
        return half

    def task(self, content: RecordDict) -> Received:
        """Check a message and forget what belongs to another federation than its own."""
        task, own = Received(content), self.config.run.method
        if task.header.method != own:
            raise WireError(f"it is of method {task.header.method!r:.80}; this run is {own!r}.")
        self.state.enter_federation(task.header.federation_id)
        return task

    def store(self, module: nn.Module, evaluation: Evaluation) -> str:
        """Store the own model with the weights that it holds now; return their path.

        Without a state folder they go below the run's output folder; "" without either.
        """
        folder = personal_folder(self.state, self.config.run.output_dir, self.client_id)
        if folder is None:
            return ""
        personal = PersonalModel(self.model_name, module, self.data, evaluation)
        # the export takes seconds, and a simulation has many clients nobody deploys
        return str(personal.store(folder, program=isinstance(self.state, FolderState)))
