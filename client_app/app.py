"""The Flower ClientApp: register, train, evaluate, finish."""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.participant import Participant
from client_app.workshop import cpu_threads
from common import wire
from common.codec import Float32

app = ClientApp()


def _source(message: Message, participant: Participant) -> str:
    return f"{message.metadata.message_type} message to client {participant.client_id}"


@app.query("register")
def register(message: Message, context: Context) -> Message:
    """Answer `query.register`: identity and counts."""
    participant = Participant.open(context)
    wire.decode_header(message.content, _source(message, participant))
    return _reply(message, wire.encode_registration(participant.register()))


@app.train("personal")
def train_personal(message: Message, context: Context) -> Message:
    """Answer `train.personal`: the change of the personal model (and of w_g when fused)."""
    return _train(message, context)


@app.train("global")
def train_global(message: Message, context: Context) -> Message:
    """Answer `train.global`: the change of w_g."""
    return _train(message, context)


def _train(message: Message, context: Context) -> Message:
    participant = Participant.open(context)
    source = _source(message, participant)
    task = wire.decode_train_task(message.content, source)
    with cpu_threads(participant.section.client_threads):
        reply = participant.train(task, source)
    return _reply(message, wire.encode_train_reply(reply, task.header.precision))


@app.evaluate("personal")
def evaluate_personal(message: Message, context: Context) -> Message:
    """Answer `evaluate.personal`: test counts of the weights as received."""
    participant = Participant.open(context)
    with cpu_threads(participant.section.client_threads):
        header, theta = _theta(message, participant)
        return _reply(message, wire.encode_evaluation(participant.evaluate(header, theta)))


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Answer `query.finish`: store the personal model and say where."""
    participant = Participant.open(context)
    with cpu_threads(participant.section.client_threads):
        header, theta = _theta(message, participant)
        return _reply(message, wire.encode_finish_reply(participant.finish(header, theta)))


def _theta(message: Message, participant: Participant) -> tuple[wire.Header, Float32]:
    return wire.decode_theta(
        message.content,
        length=participant.register().num_parameters,
        source=_source(message, participant),
    )


def _reply(message: Message, content: RecordDict) -> Message:
    return Message(content, reply_to=message)
