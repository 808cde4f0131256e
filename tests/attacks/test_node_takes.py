"""A server whose messages are no questions, or larger than they look, or of runs without end."""

import json
from typing import Any

import httpx
import pytest
from flwr.app import Array, Message
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
)
from flwr.supercore.object_store import NoObjectInStoreError

from common.config.section import Scalar
from experiments.deploy import node_guard
from tests.support.node import NODE, RUN, Node, identity, packed, pulled, question, take

__all__ = ["identity"]

pytestmark = pytest.mark.usefixtures("identity")


@pytest.mark.parametrize("config", [{"models": "cnn", "no-such-key": 1}, {"models": "x" * 70_000}])
def test_a_configuration_that_is_no_runs_of_the_app_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Scalar]
) -> None:
    """The first would end the SuperNode's loop, the second stay in its memory for good."""
    (reply,) = pulled(monkeypatch, packed(), config)
    assert reply.error.code == ErrorCode.INVALID_FAB


def left(node: Node) -> tuple[int, int]:
    """Return how many messages, and tasks at work, a SuperNode has."""
    tasks = node.state.get_tasks(statuses=node_guard.UNFINISHED)
    return len(node.state.msg_store), len(tasks)


@pytest.mark.parametrize("wrong", [{"reply_to": "x" * 64}, {"node": NODE + 1}])
def test_what_is_no_question_to_this_node_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    """A reply would be sent back as it came, and leave a task, for which a process is started."""
    node = Node(monkeypatch)
    before = left(node)
    for _ in range(3):
        assert take(node, packed(), question(**wrong)) is None
    nameless, *parts = question()
    nameless.metadata.__dict__["_message_id"] = ""
    assert take(node, packed(), (nameless, *parts)) is None
    assert left(node) == before
    assert take(node, packed(), question()) == RUN + 1


def swollen(times: int) -> tuple[Message, dict[str, bytes], ObjectTree]:
    """Return a question whose array names its one chunk so many times: a few bytes each."""
    message, pieces, _ = question(size=1000)
    contents: dict[str, bytes] = {}

    def rebuilt(name: str) -> str:
        kind, children, _ = get_object_head_values_from_object_content(content := pieces[name])
        for child in children:
            content = content.replace(child.encode(), rebuilt(child).encode())
        if kind == "Array":
            about = json.loads(get_object_body(content, Array))
            body = json.dumps({**about, "arraychunk_ids": [0] * times}).encode()
            content = content.split(b" ", 2)[0] + b" " + content.split(b" ", 2)[1]
            content += b" %d\0" % len(body) + body
        contents[get_object_id(content)] = content
        return get_object_id(content)

    def tree(name: str) -> ObjectTree:
        _, children, _ = get_object_head_values_from_object_content(contents[name])
        return ObjectTree(object_id=name, children=map(tree, children))

    top = rebuilt(message.metadata.message_id)
    message.metadata.__dict__["_message_id"] = top
    return message, contents, tree(top)


def test_one_that_is_far_larger_than_its_pieces_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node(monkeypatch)
    before = left(node)
    assert take(node, packed(), swollen(1)) == RUN + 1
    assert take(node, packed(), swollen(150_000)) is None  # 600 MB
    assert left(node) == (before[0] + 1, before[1] + 1)


def test_nor_is_one_of_too_many_or_too_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch)
    message, pieces, tree = question(size=1000)
    many = ObjectTree(object_id=tree.object_id, children=[tree.children[0]] * 1000)
    assert take(node, packed(), (message, pieces, many)) == RUN + 1
    assert node.to_send()[-1].error.code == ErrorCode.INVALID_FAB
    monkeypatch.setattr(node_guard, "LARGEST_REPLY", 20_000)
    before, fetched = left(node), []
    message, pieces, tree = question(size=1000, count=25)

    class Served(dict[str, bytes]):
        def __getitem__(self, name: str) -> bytes:
            fetched.append(name)
            return super().__getitem__(name)

    assert take(node, packed(), (message, Served(pieces), tree)) is None
    assert left(node) == before
    assert 5 <= len(fetched) < len(pieces) - 10, "it is not fetched to its end"


def test_of_runs_and_apps_the_newest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    node, most = Node(monkeypatch), node_guard.MOST_RUNS
    for number in range(2 * most):
        app = packed(version=f"0.{number}")
        asked = question(run_id=RUN + 1 + number)
        assert take(node, app, asked, fab_version=f"0.{number}") == RUN + 1 + number
    state = node.state
    assert len(state.run_store) == len(state.run_series_context_store) == most
    assert len(state.fab_store) == most
    assert state.get_run(RUN + 2 * most) is not None


def test_the_pieces_of_one_that_no_app_confirmed_go(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch)
    asked, store = node.message.metadata.message_id, node.state.object_store
    assert store.get_object_tree(asked)
    node.end(SubStatus.FAILED)
    (reply,) = node.to_send()
    assert store.get_object_tree(reply.metadata.message_id)
    with pytest.raises(NoObjectInStoreError):
        store.get_object_tree(asked)


def test_no_app_begins_before_its_message_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is not, its reply would stay; and with each further one an app would work on."""
    node = Node(monkeypatch)
    before, claimed = left(node), []

    def claim() -> None:
        tasks = node.state.get_tasks(statuses=[Status.PENDING])
        claimed.extend(node.state.claim_task(task.task_id) for task in tasks)

    def fail() -> None:
        claim()
        httpx.Response(500, request=httpx.Request("POST", "https://a/b")).raise_for_status()

    assert take(node, packed(), question(), confirm=fail) is None
    assert claimed == [None]
    assert left(node) == before
    assert take(node, packed(), question()) == RUN + 1
    claim()
    assert claimed[1:] != [None], "the next is as ever"


@pytest.mark.parametrize("pieces", [1, 9])
def test_a_reply_to_what_is_forgotten_is_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """A part would hold up all others for good, a whole one be sent in the place of the next."""
    node = Node(monkeypatch)
    node.take()
    node.reply(pieces=pieces)
    asked = node.message.metadata.message_id
    (late,) = [name for name in node.state.msg_store if name != asked]
    node.state.delete_messages(message_ids=[asked])
    node.end(SubStatus.FAILED)
    message, *parts = question()
    assert take(node, packed(), (message, *parts)) == RUN + 1
    assert node.to_send() == [], "its task waits"
    with pytest.raises(NoObjectInStoreError):
        node.state.object_store.get_object_tree(late)
    (task,) = node.state.get_tasks(statuses=[Status.PENDING])
    node.state.finish_task(task.task_id, SubStatus.FAILED, "")
    (reply,) = node.to_send()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id


def test_an_app_of_nobody_trusted_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower answers it itself, and remembers no message that it would be the reply to."""
    node = Node(monkeypatch)
    assert take(node, packed(), question(), trusted={"fpk_1": "a key"}) == RUN + 1
    assert node.to_send()[-1].error.code == ErrorCode.INVALID_FAB
