"""A participant's SuperNode in this process: its state, with Flower's own handlers before it."""

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto, run_from_proto, user_config_value_to_proto
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.supercore import task_identity
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as worker
from flwr.supernode.nodestate import NodeStateFactory, nodestate_factory
from flwr.supernode.servicer.runtime import runtime_handlers as handlers

from common.config.section import Scalar
from experiments.deploy import node_guard
from experiments.deploy.superlink import on_a_line

FAB = b"an app"
NODE, RUN = 7, 1


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flower signs messages by who this process is."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(task_identity.TaskIdentity, name) for name in names}
    for name, value in zip(names, (RUN, NODE, 1), strict=True):
        setattr(task_identity.TaskIdentity, name, value)
    yield
    logging.getLogger("flwr").removeFilter(on_a_line)
    for name, kept in before.items():
        setattr(task_identity.TaskIdentity, name, kept)


class Node:
    """A SuperNode's state with one message in it, and Flower's own handlers before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fab_hash: str = "") -> None:
        for module in (nodestate_factory, worker):
            for name, value in vars(module).items():
                monkeypatch.setitem(vars(module), name, value)
        node_guard.install()
        self.state: Any = NodeStateFactory(ObjectStoreFactory()).state()
        self.state.set_node_id(NODE)
        named = fab_hash or hashlib.sha256(FAB).hexdigest()
        run = run_from_proto(Run(run_id=RUN, fab_id="a/b", fab_version="1", fab_hash=named))
        self.state.store_run(run)
        self.state.store_fab(Fab(hashlib.sha256(FAB).hexdigest(), FAB, {}))
        context = Context(RUN, NODE, {}, RecordDict(), {})
        self.state.set_run_series_context(run.series_id, context)
        number: Any = self.state.create_task(TaskType.CLIENT_APP, run_id=RUN, fab_hash=named)
        self.message = Message(RecordDict(), NODE, "query.register")
        self.message.metadata.__dict__["_run_id"] = RUN
        self._insert(self.message)
        self.state.claim_task(number)
        (self.task,) = self.state.get_tasks(task_ids=[number])

    def _insert(self, message: Message) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state._store_generated_message(message)
        self.state.store_message(message)

    def take(self) -> None:
        handlers.pull_task_input(PullTaskInputRequest(), self.state, self.task)
        assert handlers.pull_messages(PullAppMessagesRequest(), self.state, self.task).messages_list

    def reply(self, *, pieces: int) -> None:
        """Reply as an app does, with so many of the reply's pieces."""
        content = RecordDict({"config": ConfigRecord({"said": "yes"})})
        reply = Message(content, reply_to=self.message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        found, tree = get_all_nested_objects(reply), get_object_tree(reply)
        bare = message_to_proto(remove_content_from_message(reply))
        request = PushAppMessagesRequest(messages_list=[bare], message_object_trees=[tree])
        session = handlers.push_messages(request, self.state, self.task).session_id
        for name in [*found][:pieces]:
            piece = PushObjectRequest(
                object_id=name, object_content=found[name].deflate(), session_id=session
            )
            assert handlers.push_object(piece, self.state, self.task).stored

    def end(self, status: str) -> None:
        request = PushTaskOutputRequest(sub_status=status, details="")
        handlers.push_task_output(request, self.state, self.task)

    def to_send(self) -> list[Message]:
        """Return what the SuperNode's loop finds, which waits for something without end."""
        return list(self.state.get_messages_legacy(is_reply=True))


def packed(name: str = "mh-pfedhn", version: str = "0.1.0") -> bytes:
    """Return an app."""
    components = '[tool.flwr.app.components]\nserverapp = "a:app"\nclientapp = "a:app"\n'
    text = f'[project]\nname = "{name}"\nversion = "{version}"\ndescription = ""\nlicense = "MIT"\n'
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as app:
        text += f'[tool.flwr.app]\npublisher = "lab"\n{components}'
        text += '[tool.flwr.app.config]\nmodels = ""\n'
        app.writestr("pyproject.toml", text)
    return file.getvalue()


def question(
    *, run_id: int = RUN + 1, node: int = NODE, reply_to: str = "", size: int = 0, count: int = 1
) -> tuple[Message, dict[str, bytes], ObjectTree]:
    """Return a message with arrays of so many numbers, its pieces, and how they belong."""
    drawn = np.random.default_rng(0).random((count, size), np.float32)
    arrays = ArrayRecord({f"array {i}": Array(x) for i, x in enumerate(drawn)})
    message = Message(RecordDict({"arrays": arrays} if size else {}), node, "query.register")
    own = {"_run_id": run_id, "_reply_to_message_id": reply_to}
    message.metadata.__dict__.update(own)
    message.metadata.__dict__["_message_id"] = message.object_id
    pieces = {name: piece.deflate() for name, piece in get_all_nested_objects(message).items()}
    return message, pieces, get_object_tree(message)


def take(
    node: Node,
    content: bytes,
    asked: tuple[Message, dict[str, bytes], ObjectTree],
    config: Mapping[str, Scalar] | None = None,
    *,
    confirm: Callable[[], None] = lambda: None,
    trusted: Mapping[str, str] | None = None,
    **stated: str,
) -> int | None:
    """Let a SuperNode take a message of a run of an app; return of which run it took one.

    `confirm` is what its server does when the message is confirmed.
    """
    message, pieces, tree = asked
    hashed = hashlib.sha256(content).hexdigest()
    stated = {"fab_id": "lab/mh-pfedhn", "fab_version": "0.1.0", "fab_hash": hashed} | stated
    override = {k: user_config_value_to_proto(v) for k, v in (config or {}).items()}
    bare = remove_content_from_message(message) if message.content else message
    bare.metadata.__dict__["_message_id"] = message.metadata.message_id

    def described(run_id: int) -> Any:
        proto = Run(run_id=run_id, series_id=run_id, override_config=override, **stated)
        return run_from_proto(proto)

    known: dict[str, Any] = {
        "state": node.state,
        "object_store": node.state.object_store,
        "node_config": {},
        "receive": lambda: (bare, tree),
        "get_run": described,
        "get_fab": lambda name, run: Fab(hashed, content, {}),
        "pull_object": lambda run, name: pieces[name],
        "confirm_message_received": lambda run, name: confirm(),
        "trusted_entities": trusted,
    }
    found: int | None = vars(worker)["_pull_and_store_message"](**known)
    return found


def pulled(
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    config: Mapping[str, Scalar] | None = None,
    **stated: str,
) -> list[Message]:
    """Let a SuperNode take a message of a run of an app; return what it answers at once."""
    node = Node(monkeypatch)
    assert take(node, content, question(), config, **stated) == RUN + 1
    assert (node.state.get_run(RUN + 1) is None) == any(
        entry.message.has_error() for entry in node.state.msg_store.values()
    )
    return [x for x in node.to_send() if x.metadata.run_id == RUN + 1]
