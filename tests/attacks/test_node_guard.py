"""A server, with messages that no app can answer, and apps that are others than it says."""

import hashlib
import io
import logging
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.supercore import task_identity
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as worker
from flwr.supernode.nodestate import NodeStateFactory, nodestate_factory
from flwr.supernode.servicer.runtime import runtime_handlers as handlers
from rich.console import Console

from common.config import ClientSection
from common.errors import ConfigError
from experiments.deploy import node_guard
from experiments.deploy.checks import check_trusted, run_checks
from experiments.deploy.rehearsal import Trial
from experiments.deploy.settings import JoinSettings
from experiments.deploy.superlink import on_a_line
from experiments.deploy.supervise import explain

FAB = b"an app"
NODE, RUN = 7, 1


@pytest.fixture(autouse=True)
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


def test_a_message_that_no_task_takes_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch, fab_hash="another than the app's that came")
    with pytest.raises(FlowerError):
        node.take()
    assert node.to_send() == []
    node.end(SubStatus.FAILED)
    (reply,) = node.to_send()
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert node.to_send() == [], "once"


@pytest.mark.parametrize("status", [SubStatus.FAILED, SubStatus.COMPLETED])
@pytest.mark.parametrize("pieces", [None, 0, 1])
def test_so_is_one_whose_reply_does_not_come(
    monkeypatch: pytest.MonkeyPatch, status: str, pieces: int | None
) -> None:
    node = Node(monkeypatch)
    node.take()
    if pieces is not None:
        node.reply(pieces=pieces)
    assert node.to_send() == [], "the task is at work"
    node.end(status)
    (reply,) = node.to_send()
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == node.message.object_id
    assert node.state.object_store.get_object_tree(reply.metadata.message_id)


def test_so_is_one_whose_app_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch)
    node.take()
    node.reply(pieces=1)
    for record in node.state.task_token_store.values():
        record.active_until = now() - timedelta(seconds=1)
    assert node.to_send()[0].has_error()


@pytest.mark.parametrize("status", [SubStatus.FAILED, SubStatus.COMPLETED, ""])
def test_a_reply_that_is_there_is_sent(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    node = Node(monkeypatch)
    node.take()
    node.reply(pieces=9)
    if status:
        node.end(status)
    (reply,) = node.to_send()
    assert not reply.has_error()
    assert node.to_send() == []


def packed(name: str = "mh-pfedhn", version: str = "0.1.0") -> bytes:
    """Return an app."""
    components = '[tool.flwr.app.components]\nserverapp = "a:app"\nclientapp = "a:app"\n'
    text = f'[project]\nname = "{name}"\nversion = "{version}"\ndescription = ""\nlicense = "MIT"\n'
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as app:
        text += f'[tool.flwr.app]\npublisher = "lab"\n{components}'
        app.writestr("pyproject.toml", text)
    return file.getvalue()


def pulled(monkeypatch: pytest.MonkeyPatch, content: bytes, **stated: str) -> list[Message]:
    """Let a SuperNode take a message of a run of an app; return what it answers at once."""
    node = Node(monkeypatch)
    hashed = hashlib.sha256(content).hexdigest()
    stated = {"fab_id": "lab/mh-pfedhn", "fab_version": "0.1.0", "fab_hash": hashed} | stated
    message = Message(RecordDict(), NODE, "query.register")
    message.metadata.__dict__["_run_id"] = RUN + 1
    message.metadata.__dict__["_message_id"] = message.object_id
    found = get_all_nested_objects(message)
    known: dict[str, Any] = {
        "state": node.state,
        "object_store": node.state.object_store,
        "node_config": {},
        "receive": lambda: (message, get_object_tree(message)),
        "get_run": lambda run: run_from_proto(Run(run_id=run, series_id=9, **stated)),
        "get_fab": lambda name, run: Fab(hashed, content, {}),
        "pull_object": lambda run, name: found[name].deflate(),
        "confirm_message_received": lambda run, name: None,
        "trusted_entities": None,
    }
    assert vars(worker)["_pull_and_store_message"](**known) == RUN + 1
    assert (node.state.get_run(RUN + 1) is None) == any(
        entry.message.has_error() for entry in node.state.msg_store.values()
    )
    return [x for x in node.to_send() if x.metadata.run_id == RUN + 1]


def test_an_app_is_taken_that_is_what_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pulled(monkeypatch, packed()) == []


@pytest.mark.parametrize(
    ("content", "stated"),
    [
        (packed(), {"fab_version": "0.1.0.45f9f757/../../../../../tmp/evil/x"}),
        (packed(), {"fab_id": "lab/../evil"}),
        (packed(), {"fab_id": "other/mh-pfedhn"}),
        (packed(), {"fab_hash": "0" * 64}),
        (packed(version="1/../../x"), {"fab_version": "1/../../x"}),
        (packed(name=".."), {"fab_id": "lab/.."}),
    ],
)
def test_one_that_would_be_loaded_from_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, content: bytes, stated: dict[str, str]
) -> None:
    """Its content is verified; from which folder it is loaded, the server would say."""
    (reply,) = pulled(monkeypatch, content, **stated)
    assert reply.error.code == ErrorCode.INVALID_FAB


def test_a_round_that_is_named_so_is_no_exit_of_flowers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Node(monkeypatch)
    logging.getLogger("flwr").error("[RUN %s, ROUND %s]", 1, "1\nExit Code: 302")
    assert caplog.records[-1].getMessage() == "[RUN 1, ROUND 1 Exit Code: 302]"
    logging.getLogger("flwr").error("Exit Code: 606\nanother version")
    assert explain([f"ERROR :     {caplog.records[-1].getMessage()}"])[0] == 606


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"


@pytest.mark.parametrize(
    "text", ["", "{}", "[a]", "a: b", "a: 1", "a: {", "[" * 100_000, f"a: {KEY}\nb: x", None]
)
def test_a_file_that_trusts_nobody_is_refused(tmp_path: Path, text: str | None) -> None:
    """Of an empty one Flower verifies nothing."""
    if text is not None:
        (tmp_path / "trusted.yaml").write_text(text)
    values = {
        "client-id": "a",
        "server": "x:1",
        "insecure": True,
        "trusted-entities": "trusted.yaml",
    }
    settings = JoinSettings.parse(values | {"state-dir": "state"}, tmp_path)
    trial = Trial(settings, ClientSection())
    with pytest.raises(ConfigError, match=r"trusted.yaml .*whose signature an app must have"):
        check_trusted(trial)
    (tmp_path / "trusted.yaml").write_text(f"fpk_1: {KEY}\n")
    assert "one of 1" in check_trusted(trial).detail


def test_join_looks_at_it(tmp_path: Path) -> None:
    (tmp_path / "trusted.yaml").write_text("{}")
    values = {"client-id": "a", "server": "127.0.0.1:9", "insecure": True, "dataset": "digits"}
    values |= {"trusted-entities": "trusted.yaml", "state-dir": "state", "model": "mlp"}
    settings, told = JoinSettings.parse(values, tmp_path), io.StringIO()
    settings.folder.mkdir(parents=True)
    assert not run_checks(settings, Console(file=told, width=400), must_answer=False)
    assert "names nobody with an Ed25519 key to trust" in told.getvalue()
