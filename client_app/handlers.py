"""What a participant replies to each kind of message, whatever the method.

Imports torch; `app.py` decides in which process it runs.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, RecordDict

from client_app.methods.base import Method
from client_app.models.instances import cpu_threads
from client_app.participant import Participant
from client_app.training.evaluation import evaluate
from common.errors import WireError, unknown_name
from common.messages import (
    EVALUATE,
    EVALUATE_FIRST,
    FINISH,
    LOCATION,
    REGISTER,
    TRAIN,
    TrainReply,
)
from common.methods import METHODS
from common.records import Content, Received, encode


def reply_to(message_type: str, content: RecordDict, context: Context) -> RecordDict:
    """Do what one message of the server asks; return the reply's content.

    Raises
    ------
    MHpFedHNError
        The configuration, the data, the model or the message cannot be used.
    """
    participant = Participant.open(context)
    info = METHODS[participant.config.run.method]
    if message_type not in _HANDLERS:
        raise WireError(unknown_name("message type", message_type, _HANDLERS))
    with cpu_threads(participant.section.client_threads):
        try:
            task = participant.task(content)
            reply = _HANDLERS[message_type](info.load("client_app")(participant), task)
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
    instance = method.ready(task, before=now)
    trained = method.fit(task, instance)
    method.keep(task, instance)
    reply = TrainReply(trained.num_examples, trained.loss, trained.seconds, evaluation)
    return Content(reply.settings(), method.collect(task, instance))


def _evaluate(method: Method, task: Received) -> Content:
    instance = method.ready(task, before=task.header.server_round + 1)
    return Content(method.measure(task, instance).settings())


def _finish(method: Method, task: Received) -> Content:
    """Store the personal model as a plain torch state_dict, and say where."""
    instance = method.ready(task, before=task.header.server_round + 1)
    method.adapt(task, instance)
    evaluation = evaluate(instance.model, method.data)
    return Content({LOCATION: method.participant.store(instance.model.module, evaluation)})


_HANDLERS: dict[str, Callable[[Method, Received], Content]] = {
    REGISTER: _register,
    TRAIN: _train,
    EVALUATE: _evaluate,
    FINISH: _finish,
}
