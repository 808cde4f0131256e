"""The Flower ClientApp: register, train, evaluate, finish.

Imports no torch: a deployed client starts a process for every message, and this one only forwards
it to the participant's warm worker where there is one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.folders import state_folder
from client_app.worker.link import Link, Patience
from client_app.worker.place import WorkerUnavailableError
from common.config import NodeConfig, RunConfig
from common.errors import ConfigError
from common.log import logger

app = ClientApp()


@app.query("register")
def register(message: Message, context: Context) -> Message:
    """Answer `query.register`: identity and counts."""
    return _reply(message, context)


@app.train("personal")
def train_personal(message: Message, context: Context) -> Message:
    """Answer `train.personal`: the change of the personal model (and of w_g when fused)."""
    return _reply(message, context)


@app.train("global")
def train_global(message: Message, context: Context) -> Message:
    """Answer `train.global`: the change of w_g."""
    return _reply(message, context)


@app.evaluate("personal")
def evaluate_personal(message: Message, context: Context) -> Message:
    """Answer `evaluate.personal`: test counts of the weights as received."""
    return _reply(message, context)


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Answer `query.finish`: store the personal model and say where."""
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    return Message(_answer(message, context), reply_to=message)


def _answer(message: Message, context: Context) -> RecordDict:
    """Let the warm worker answer, or answer here when there is none."""
    message_type = message.metadata.message_type
    try:
        link = _worker(context)
        if link is not None:
            return link.ask(message_type, message.content)
    except WorkerUnavailableError as error:
        logger.warning("No warm worker (%s); handling %s in process.", error, message_type)
    from client_app.handlers import answer  # imports torch: seconds

    return answer(message_type, message.content, context)


def _worker(context: Context) -> Link | None:
    """Return the way to the worker, or None when the message is to be handled in this process.

    `auto` means: where the participant itself declared a state folder (Flower's simulation declares
    none), unless this process has torch already and would gain nothing.
    """
    config = RunConfig.parse(context.run_config)
    node = NodeConfig.parse(context.node_config)
    section = node.client_section(config)
    if section.warm_worker == "on" and not section.state_dir:
        raise ConfigError(
            "warm-worker = 'on' needs a state-dir: the worker keeps what belongs to this "
            "participant there. Set state-dir, or warm-worker to 'auto'."
        )
    useful = bool(node.state_dir) and "torch" not in sys.modules
    if section.warm_worker == "off" or (section.warm_worker == "auto" and not useful):
        return None
    folder = state_folder(section.state_dir, node.identity)
    return Link.open(context, Path(folder), Patience())
