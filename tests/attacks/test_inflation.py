"""Replies that are put together from pieces: within bounds, each on its own, waiting for nobody."""

import json
import tracemalloc
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity

from common.inflation import FEW, GRID, PATIENCE_S, Replies, bound_replies

MOST = 4 * 2**20
TIMES = 1500
NOTHING: Mapping[str, Any] = MappingProxyType({})


class SuperLink:
    """What the grid asks of a SuperLink: it says once who has replied, and hands out pieces."""

    def __init__(self) -> None:
        self.new = PullAppMessagesResponse()
        self.pieces: dict[str, bytes] = {}
        self.confirmed: list[str] = []
        self.now = 0.0
        self.asked_for = 0
        self.grid = SimpleNamespace(
            _runtime_client=self, _run=SimpleNamespace(run_id=1), node=Node(node_id=1)
        )
        self.replies = Replies({"asked": MOST, "other": MOST}.get, lambda: self.now)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802
        given, self.new = self.new, PullAppMessagesResponse()
        return given

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        self.asked_for += 1
        content = self.pieces.get(request.object_id)
        return PullObjectResponse(
            object_found=True, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)

    def announce(
        self,
        answers: str = "asked",
        *,
        length: int = 100,
        more: Mapping[str, Any] = NOTHING,
        spoil: Callable[[dict[str, bytes]], dict[str, bytes]] = dict,
        claims: str = "",
        sent: bool = True,
    ) -> str:
        """Announce a reply with an array (length,), float32; returns the id of its root."""
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        question = Message(RecordDict(), 7, "train.personal")
        question.metadata.__dict__["_message_id"] = claims or answers
        arrays = ArrayRecord({"delta": Array(np.arange(length, dtype=np.float32))})
        reply = Message(RecordDict({"arrays": arrays, **more}), reply_to=question)
        found = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        self.pieces |= spoil(found) if sent else {}
        tree = get_object_tree(reply)
        proto = message_to_proto(remove_content_from_message(reply))
        proto.metadata.message_id, proto.metadata.reply_to_message_id = tree.object_id, answers
        self.new.messages_list.append(proto)
        self.new.message_object_trees.append(tree)
        return str(tree.object_id)

    def pull(self) -> dict[str, Message]:
        """Return what the grid hands out, by what it answers."""
        found = self.replies.pull(self.grid, ["asked", "other"])
        return {message.metadata.reply_to_message_id: message for message in found}


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


def changed(contents: dict[str, bytes], kind: str, new: str) -> dict[str, bytes]:
    """Call the objects of one kind by another name, under the ids that they had."""
    kinds = {n: get_object_head_values_from_object_content(c)[0] for n, c in contents.items()}
    old = kind.encode()
    return {
        n: c.replace(old, new.encode(), 1) if kinds[n] == kind else c for n, c in contents.items()
    }


def described(contents: dict[str, bytes], **claims: object) -> dict[str, bytes]:
    """Replace what an array says of itself."""
    found = {}
    for name, content in contents.items():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == "Array":
            body = json.dumps(json.loads(content.split(b"\x00", 1)[1]) | claims).encode()
            content = f"Array {','.join(children)} {len(body)}\x00".encode() + body
        found[name] = content
    return found


def test_an_honest_reply_is_put_together(superlink: SuperLink) -> None:
    name = superlink.announce(length=1000)
    reply = superlink.pull()["asked"]
    assert reply.content["arrays"]["delta"].numpy().tolist() == list(range(1000))
    assert reply.metadata.message_id == name
    assert superlink.confirmed == [name]
    assert superlink.pull() == {}


def test_a_piece_that_is_named_often_is_not_copied(superlink: SuperLink) -> None:
    superlink.announce(length=250_000, spoil=lambda c: described(c, arraychunk_ids=[0] * TIMES))
    tracemalloc.start()
    reply = superlink.pull()["asked"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than the 4,194,304 bytes" in reply.error.reason
    assert peak < MOST


@pytest.mark.parametrize("record", [ConfigRecord, MetricRecord])
def test_settings_are_small(
    superlink: SuperLink, record: type[ConfigRecord | MetricRecord]
) -> None:
    """A million numbers of two bytes each are twenty times as much memory."""
    superlink.announce(more={"more": record({"many": [1] * 100_000})})
    reply = superlink.pull()["asked"]
    assert f"its {record.__name__} has" in reply.error.reason


BAD = {
    "pieces that are not there": {"arraychunk_ids": [3]},
    "no list of pieces": {"arraychunk_ids": None},
    "a long description": {"dtype": "x" * 2**21},
}


@pytest.mark.parametrize("how", BAD)
def test_what_cannot_be_put_together_harms_no_other(superlink: SuperLink, how: str) -> None:
    superlink.announce(spoil=lambda contents: described(contents, **BAD[how]))
    superlink.announce("other", length=77)
    found = superlink.pull()
    assert "it cannot be put together" in found["asked"].error.reason
    assert len(found["other"].content["arrays"]["delta"].numpy()) == 77
    assert len(superlink.confirmed) == 2


KINDS = ["Message", "RecordDict", "ArrayRecord", "ArrayChunk"]
OTHERS = ["Nothing", "Message", "ConfigRecord", "MetricRecord", "ArrayRecord", "RecordDict"]


@pytest.mark.parametrize(("kind", "new"), [(k, n) for k in KINDS for n in OTHERS if n != k])
def test_pieces_of_another_kind(superlink: SuperLink, kind: str, new: str) -> None:
    """The root too: what is no message has no metadata, and must not end the pull of the others."""
    superlink.announce(spoil=lambda contents: changed(contents, kind, new))
    superlink.announce("other", length=77)
    found = superlink.pull()
    assert found["asked"].has_error()
    assert not found["other"].has_error()


@pytest.mark.parametrize("body", [b"\xff" * 20, b""])
def test_a_reply_that_does_not_say_what_it_answers(superlink: SuperLink, body: bytes) -> None:
    content = f"Message  {len(body)}\x00".encode() + body

    def spoil(contents: dict[str, bytes]) -> dict[str, bytes]:
        return {n: content if c.startswith(b"Message ") else c for n, c in contents.items()}

    superlink.announce(spoil=spoil)
    assert superlink.pull()["asked"].has_error()


def test_a_reply_in_the_name_of_another_is_refused(superlink: SuperLink) -> None:
    superlink.announce(claims="other")
    found = superlink.pull()
    assert "it answers another message" in found["asked"].error.reason
    assert "other" not in found


def test_what_nobody_asked_for_costs_nothing(superlink: SuperLink) -> None:
    """A node can hand in messages that answer none, or one twice."""
    superlink.announce("", length=200_000)
    superlink.announce("long ago")
    superlink.announce()
    superlink.announce(length=50)
    found = superlink.pull()
    assert found.keys() == {"asked"}
    assert len(found["asked"].content["arrays"]["delta"].numpy()) == 100
    assert superlink.asked_for <= 8
    assert len(superlink.confirmed) == 4, "the SuperLink forgets what nobody wants"


def test_one_array_of_a_thousand_names_is_refused(superlink: SuperLink) -> None:
    array = Array(np.arange(10, dtype=np.float32))
    superlink.announce(more={"more": ArrayRecord({f"name {i}": array for i in range(1000)})})
    assert "its ArrayRecord has" in superlink.pull()["asked"].error.reason


def test_nobody_waits_for_pieces_that_do_not_come(superlink: SuperLink) -> None:
    superlink.announce(sent=False)
    superlink.announce("other")
    assert superlink.pull().keys() == {"other"}
    before = superlink.asked_for
    for superlink.now in (1.0, PATIENCE_S - 1):
        assert superlink.pull() == {}
    assert superlink.asked_for - before <= 8, "a few pieces are asked for each time"
    superlink.now = PATIENCE_S + 1
    assert "did not come in 120 s" in superlink.pull()["asked"].error.reason


def test_a_slow_reply_comes_when_all_of_it_is_there(superlink: SuperLink) -> None:
    """Longer in all than the patience for one piece."""
    superlink.announce(length=2_000)
    whole, superlink.pieces = superlink.pieces, {}
    for name, content in whole.items():
        assert superlink.pull() == {}
        superlink.now += 0.9 * PATIENCE_S
        superlink.pieces[name] = content
    assert len(superlink.pull()["asked"].content["arrays"]["delta"].numpy()) == 2_000


def test_too_many_pieces_are_refused(superlink: SuperLink) -> None:
    superlink.announce()
    tree = superlink.new.message_object_trees[0]
    for number in range(FEW + MOST // 2**20):
        tree.children.add(object_id=f"{number:064x}")
    reply = superlink.pull()["asked"]
    assert "pieces" in reply.error.reason
    assert superlink.asked_for == 0


def test_too_many_bytes_are_refused_while_they_come(superlink: SuperLink) -> None:
    superlink.announce(length=2_000_000)
    assert "more than 4,194,304 bytes" in superlink.pull()["asked"].error.reason


def test_a_superlink_that_is_gone_is_not_a_replys_fault(superlink: SuperLink) -> None:
    superlink.announce()

    def gone(request: Any) -> None:
        raise httpx.ConnectError("gone")

    superlink.PullObject, kept = gone, superlink.PullObject  # type: ignore[method-assign]
    with pytest.raises(httpx.ConnectError):
        superlink.pull()
    superlink.PullObject = kept  # type: ignore[method-assign]
    assert not superlink.pull()["asked"].has_error()


def test_the_grid_of_a_deployment_pulls_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink.grid import http_grid

    assert http_grid.__name__ == GRID
    monkeypatch.setattr(http_grid.HttpGrid, "pull_messages", http_grid.HttpGrid.pull_messages)
    bound_replies({"asked": MOST}.get)
    superlink = SuperLink()
    superlink.announce()
    grid = http_grid.HttpGrid(token="x")
    vars(grid).update(vars(superlink.grid) | {"_client": superlink})
    vars(grid).pop("_runtime_client")
    (reply,) = grid.pull_messages(["asked"])
    assert not reply.has_error()
