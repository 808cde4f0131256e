"""The Flower ClientApp: register, train, evaluate, finish.

Imports no torch: a deployed client starts a process for every message, and this one only forwards
it to the participant's warm worker where there is one.
"""

from __future__ import annotations

import sys
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from client_app.outgoing import outgoing_error
from client_app.worker.link import Link, WorkerUnavailableError
from common.config import declared
from common.errors import ConfigError
from common.files import state_folder
from common.log import logger

app = ClientApp()


@app.query("register")
@app.train("personal")
@app.evaluate("personal")
@app.query("finish")
@app.query("refused")
def reply(message: Message, context: Context) -> Message:
    """Reply to a message, whatever its type.

    `query.register`: identity and counts; `train.personal`: test and train what came, send what the
    method sends; `evaluate.personal`: test counts of the weights as received; `query.finish`: store
    the personal model and say where, or note that the run pauses; `query.refused`: note why it is
    not admitted.

    An error of a deployed participant leaves it without paths, layer names and traceback; its own
    log has the whole.
    """
    try:
        return Message(_content(message, context), reply_to=message)
    except Exception as error:  # whatever it is, its text would go to the server
        if not context.node_config.get("client-id"):
            raise
        logger.exception("%s failed", message.metadata.message_type)
        raise outgoing_error(error, context.node_config, context.run_config) from None


def _content(message: Message, context: Context) -> RecordDict:
    """Let the warm worker reply, or reply here when there is none."""
    message_type = message.metadata.message_type
    try:
        link = _worker(context)
        if link is not None:
            return _decode(link.ask(message_type, _encode(message.content)))
    except WorkerUnavailableError as error:
        logger.warning("No warm worker (%s); handling %s in process.", error, message_type)
    from client_app.participant import reply_to  # imports torch: seconds

    return reply_to(message_type, message.content, context)


def _worker(context: Context) -> Link | None:
    """Return the way to the worker, or None when the message is to be handled in this process.

    `auto` means: where the participant itself declared a state folder (Flower's simulation declares
    none), unless this process has torch already and would gain nothing.
    """
    run, own = context.run_config, context.node_config
    _, node, section, client_id = declared((*run.items(),), (*own.items(),))
    if node.warm_worker == "on" and not section.state_dir:
        raise ConfigError(
            "warm-worker = 'on' needs a state-dir: the worker keeps what belongs to this "
            "participant there. Set state-dir, or warm-worker to 'auto'."
        )
    useful = bool(node.state_dir) and "torch" not in sys.modules
    if node.warm_worker == "off" or (node.warm_worker == "auto" and not useful):
        return None
    return Link(
        folder=state_folder(section.state_dir, client_id) / "worker",
        function=f"{__name__}:{reply_in_worker.__name__}",
        context={
            "run_id": context.run_id,
            "node_id": context.node_id,
            "node_config": dict(own),
            "run_config": dict(run),
        },
    )


def reply_in_worker(facts: dict[str, Any], body: bytes) -> bytes:
    """Reply to a message that its own process forwarded to the worker."""
    from client_app.participant import reply_to

    message_type = facts.pop("message_type")
    return _encode(reply_to(message_type, _decode(body), Context(state=RecordDict(), **facts)))


def _encode(content: RecordDict) -> bytes:
    """Return Flower's protobuf bytes of a message's content."""
    data: bytes = recorddict_to_proto(content).SerializeToString()
    return data


def _decode(body: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(body))
