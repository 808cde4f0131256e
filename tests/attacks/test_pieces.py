"""Pieces at a SuperLink: nobody spoils, steals, floods with or leaves behind those of others."""

import contextlib
import secrets
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from experiments.deploy.guard import (
    MOST_ANNOUNCED,
)
from tests.support.link import Link


def chunks(count: int, size: int = 1000) -> dict[str, bytes]:
    made = [ArrayChunk(secrets.token_bytes(size)).deflate() for _ in range(count)]
    return {get_object_id(content): content for content in made}


def trees(names: Iterable[str]) -> list[ObjectTree]:
    return [ObjectTree(object_id=name) for name in names]


def vector() -> tuple[Array, RecordDict]:
    array = Array(np.random.default_rng(1).standard_normal(500).astype(np.float32))
    return array, RecordDict({"arrays": ArrayRecord({"global-theta": array})})


def test_a_message_is_not_confirmed_before_it_is_there(link: Link) -> None:
    """It would be deleted under the hands of who is sending it, and end the run."""
    evil, good = link.nodes
    link.send(evil)
    pieces = chunks(3)
    root = secrets.token_hex(32)
    session = link.reply(evil, link.fetch(evil), trees(pieces), root=root).session_id
    for name, content in pieces.items():
        with pytest.raises(FlowerError, match="confirmed before all of it is there"):
            link.confirm(evil, root)
        assert link.push(evil, session, name, content)
    with pytest.raises(FlowerError, match="confirmed before all of it is there"):
        link.confirm(evil, root)  # the message itself
    link.send(good)
    link.confirm(good, link.fetch(good).metadata.message_id)
    link.confirm(good, "0" * 64)  # one that is gone


def test_a_node_stores_no_more_than_a_reply(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a second message, that is not stored, give it more."""
    monkeypatch.setattr("experiments.deploy.guard.LARGEST_REPLY", 5000)
    evil = link.nodes[0]
    link.send(evil)
    message, pieces, stored = link.fetch(evil), chunks(12), 0
    session = link.reply(evil, message, trees(pieces), ttl=3000.0).session_id
    for name, content in pieces.items():
        try:
            stored += link.push(evil, session, name, content)
        except FlowerError:
            made_up = Message(metadata=message.metadata)
            made_up.metadata.message_id = "f" * 64
            with pytest.raises(FlowerError, match="no such message to reply to"):
                link.reply(evil, made_up, [])
    assert stored == 4, "of 1,024 bytes each"


@pytest.mark.parametrize("there", [False, True])
def test_what_all_get_is_not_spoiled_by_who_had_it_first(link: Link, there: bool) -> None:
    """A vector's id is known, or known to the first who gets it: it says what it is made of."""
    evil, good = link.nodes
    array, content = vector()
    link.send(evil, content if there else None)
    message = link.fetch(evil)
    if there:
        link.confirm(evil, message.metadata.message_id)
    session = link.reply(evil, message, trees([array.object_id]), ttl=3000.0).session_id
    assert link.push(evil, session, array.object_id, array.deflate()), "without its chunks"
    sent = link.send(good, vector()[1])
    got = link.fetch(good)
    assert got.metadata.message_id == sent
    tree = link.state.object_store.get_object_tree(sent)
    names = {node.object_id for node in iterate_object_tree(tree)}
    assert names >= set(get_all_nested_objects(array))
    assert all(link.state.object_store.get(name) for name in names), "it can be received"
    link.confirm(good, sent)


def test_a_piece_is_pushed_in_the_session_of_its_own_reply(link: Link) -> None:
    """Without one Flower takes any in which the piece is wanted, and its owner is refused."""
    evil, good = link.nodes
    link.send(good)
    empty = ArrayRecord()
    session = link.reply(good, link.fetch(good), trees([empty.object_id])).session_id
    for stolen in ("", session):
        with pytest.raises(FlowerError, match="in the session of its own reply"):
            link.push(evil, stolen, empty.object_id, empty.deflate())
    assert link.push(good, session, empty.object_id, empty.deflate())


def test_a_reply_that_is_taken_at_once_is_whole(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may ask between the moment it is there and the node's hearing of it."""
    node, pieces = link.nodes[0], chunks(2)
    asked = PullAppMessagesRequest(message_ids=[link.send(node)])
    guard = fleet_handlers.push_messages.__self__
    real = guard._push_messages

    def slow(**words: Any) -> Any:
        response = real(**words)
        first = runtime_handlers.pull_messages(asked, link.state, link.task).messages_list
        assert [message.HasField("error") for message in first] == [False]
        return response

    monkeypatch.setattr(guard, "_push_messages", slow)
    session = link.reply(node, link.fetch(node), trees(pieces)).session_id
    again = runtime_handlers.pull_messages(asked, link.state, link.task).messages_list
    assert [message.HasField("error") for message in again] == [True], "it is taken already"
    assert all(link.push(node, session, name, piece) for name, piece in pieces.items())


def test_a_reply_is_announced_a_few_times(link: Link) -> None:
    """Each time all its pieces are written down, and everybody else waits for the database."""
    evil = link.nodes[0]
    link.send(evil)
    message, pieces, root = link.fetch(evil), trees(chunks(5)), secrets.token_hex(32)
    for _ in range(MOST_ANNOUNCED):  # the answers were lost
        assert link.reply(evil, message, pieces, root=root).objects_to_push
    with pytest.raises(FlowerError, match="has been announced before"):
        link.reply(evil, message, pieces, root=root)


def test_a_reply_is_taken_and_its_message_deleted_together(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is busy in between would have lost it."""
    node = link.nodes[0]
    sent = link.send(node)
    link.reply(node, link.fetch(node), [])
    real = link.state.delete_messages
    failing = [True]

    def delete_messages(message_ins_ids: set[str]) -> None:
        if message_ins_ids and failing and failing.pop():
            raise RuntimeError("database is locked")
        real(message_ins_ids)

    monkeypatch.setattr(link.state, "delete_messages", delete_messages)
    asked = PullAppMessagesRequest(message_ids=[sent])
    with pytest.raises(RuntimeError, match="locked"):
        runtime_handlers.pull_messages(asked, link.state, link.task)
    found = runtime_handlers.pull_messages(asked, link.state, link.task).messages_list
    assert [message.HasField("error") for message in found] == [False]


def test_pieces_go_with_their_message(link: Link) -> None:
    """Of a reply that comes too late, and of a message that is never confirmed."""
    evil, good = link.nodes
    for _ in range(3):
        _, content = vector()
        sent, pieces = link.send(evil, content), chunks(5)
        message = link.fetch(evil)
        for patience in (0.05, 0.3, 2.0, 10.0):  # stored, and soon too late
            answer = link.reply(evil, message, trees(pieces), ttl=patience)
            if answer.objects_to_push:
                break
        session = answer.session_id
        time.sleep(patience + 0.05)
        (failed,) = link.pull(sent)
        assert failed.has_error()
        for name, piece in pieces.items():
            with contextlib.suppress(FlowerError, NoObjectInStoreError):
                assert not link.push(evil, session, name, piece)
        other = link.send(good)
        link.pull(other)
        link.confirm(good, other)
    assert link.num_pieces() == 0


def test_what_nobody_asks_after_goes_in_the_end(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.deploy.pieces.GRACE_S", -4000.0)
    link.send(link.nodes[0])
    assert link.num_pieces() > 0
    link.pull(link.send(link.nodes[1]))
    assert link.num_pieces() == 0


def test_an_honest_exchange_is_as_ever(link: Link) -> None:
    """Many get one vector; each one's reply comes; nothing is left behind."""
    array, _ = vector()
    for _ in range(2):
        sent = [link.send(node, vector()[1]) for node in link.nodes]
        for node in link.nodes:
            message = link.fetch(node)
            answer = FlowerMessage(RecordDict({"arrays": ArrayRecord({"delta": array})}),
                                   reply_to=message_from_proto(message))  # fmt: skip
            answer.metadata.__dict__["_message_id"] = answer.object_id
            link.confirm(node, message.metadata.message_id)
            parts = get_all_nested_objects(answer)
            request = PushMessagesRequest(
                node=Node(node_id=node), messages_list=[message_to_proto(answer)],
                message_object_trees=[get_object_tree(answer)],
            )  # fmt: skip
            response = fleet_handlers.push_messages(request=request, state=link.state)
            for name in response.objects_to_push:
                assert link.push(node, response.session_id, name, parts[name].deflate())
        found = link.pull(*sent)
        assert [reply.has_error() for reply in found] == [False, False]
    assert link.num_pieces() == 0
