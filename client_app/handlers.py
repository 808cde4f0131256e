"""What a client answers to each kind of message. Imports torch; `app.py` decides where it runs."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, RecordDict

from client_app.methods.handlers import BASELINE_HANDLERS
from client_app.participant import Participant
from client_app.workshop import cpu_threads
from common import wire
from common.compression import Float32
from common.errors import WireError, unknown_name


def answer(message_type: str, content: RecordDict, context: Context) -> RecordDict:
    """Answer one message of the server.

    Raises
    ------
    MHpFedHNError
        The configuration, the data, the model or the message cannot be used.
    """
    participant = Participant.open(context)
    handlers = BASELINE_HANDLERS if participant.config.is_baseline else _HANDLERS
    handler = handlers.get(message_type)
    if handler is None:
        raise WireError(unknown_name("message type", message_type, handlers))
    source = f"{message_type} message to client {participant.client_id}"
    with cpu_threads(participant.section.client_threads):
        return handler(participant, content, source)


def _register(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    wire.decode_header(content, source)
    return wire.encode_registration(participant.register())


def _train(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    task = wire.decode_train_task(content, source)
    reply, top_k = participant.train(task, source), participant.config.wire.uplink_top_k
    return wire.encode_train_reply(reply, task.header.precision, top_k=top_k)


def _evaluate(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    return wire.encode_evaluation(participant.evaluate(*_theta(participant, content, source)))


def _finish(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    return wire.encode_finish_reply(participant.finish(*_theta(participant, content, source)))


def _theta(
    participant: Participant, content: RecordDict, source: str
) -> tuple[wire.Header, Float32]:
    length = participant.register().num_parameters
    return wire.decode_theta(content, length=length, source=source)


Handler = Callable[[Participant, RecordDict, str], RecordDict]
_HANDLERS: dict[str, Handler] = {
    wire.REGISTER: _register,
    wire.TRAIN_PERSONAL: _train,
    wire.TRAIN_GLOBAL: _train,
    wire.EVALUATE_PERSONAL: _evaluate,
    wire.FINISH: _finish,
}
