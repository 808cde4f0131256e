"""What a node says of the pieces that it hands in: nobody has to believe it."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord
from flwr.app import Message as FlowerMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)

from experiments.deploy.pieces import is_whole
from tests.support.link import Link, chunks, guarded_link, trees, vector


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    with guarded_link(tmp_path, nodes=4) as opened:
        yield opened


def made_up(kind: str, parts: list[str]) -> tuple[str, bytes]:
    """Return a piece that says of itself what one likes, and its name."""
    head = HEAD_VALUE_DIVIDER.join((kind, ",".join(parts), "8"))
    content = head.encode() + HEAD_BODY_DIVIDER + secrets.token_hex(4).encode()
    return get_object_id(content), content


def contents(answer: FlowerMessage) -> dict[str, bytes]:
    return {name: one.deflate() for name, one in get_all_nested_objects(answer).items()}


def require_served(link: Link, nodes: list[int]) -> None:
    """Everybody gets a vector and answers with it: nothing of before is in their way."""
    sent = [link.send(node, vector()[1]) for node in nodes]
    for node in nodes:
        message = link.fetch(node)
        assert is_whole(link.state.object_store, message.metadata.message_id)
        link.confirm(node, message.metadata.message_id)
        link.hand_in(node, link.answer(message, vector()[1]))
    assert [reply.has_error() for reply in link.pull(*sent)] == [False] * len(nodes)


def require_refused(link: Link, node: int, asked: str, pieces: dict[str, bytes]) -> str:
    """The first piece that is not as was said ends the reply; the server hears of it at once."""
    before = link.num_pieces()
    with pytest.raises(FlowerError) as refused:
        _ = [link.push(node, asked, name, content) for name, content in pieces.items()]
    assert link.num_pieces() <= before, "nothing of it was stored"
    (reply,) = link.pull(asked)
    assert reply.has_error()
    return str(refused.value)


@pytest.mark.parametrize("first", [True, False])
def test_a_vector_that_all_get_is_nobodys_reply(link: Link, first: bool) -> None:
    """Announced as a message, with junk as its piece, before or after others were sent it."""
    evil, *good = link.nodes
    array, junk = vector()[0], chunks(1)
    asked = link.send(evil, None if first else vector()[1])
    link.reply(evil, link.fetch(evil), trees(junk), root=array.object_id)
    for name, piece in junk.items():
        assert link.push(evil, asked, name, piece)
    require_served(link, good)
    said = require_refused(link, evil, asked, {array.object_id: array.deflate()})
    assert "not made of what its reply says" in said
    require_served(link, link.nodes)


def test_a_piece_is_made_of_what_its_content_says(link: Link) -> None:
    """Without its parts, with others beside them, or in two ways at once."""
    evil, *good = link.nodes
    array, _ = vector()
    junk = chunks(2)
    parts = trees(array.children or {})
    for claim in ([], [*parts, *trees(junk)]):
        asked = link.send(evil)
        false = ObjectTree(object_id=array.object_id, children=claim)
        link.reply(evil, link.fetch(evil), [false])
        said = require_refused(link, evil, asked, {array.object_id: array.deflate()})
        assert "not made of what its reply says" in said
        require_served(link, good)
    asked = link.send(evil)
    message = link.fetch(evil)
    twice = [
        ObjectTree(object_id="e" * 64, children=[ObjectTree(object_id=array.object_id, children=c)])
        if c else ObjectTree(object_id=array.object_id)
        for c in ([], parts)
    ]  # fmt: skip
    for claims in (twice, trees(["a" * 64]) * 2):
        with pytest.raises(FlowerError, match="different things, each named once"):
            link.reply(evil, message, claims)
    empty = ObjectTree(object_id=ArrayRecord().object_id, children=trees(junk))
    link.reply(evil, message, [empty])
    require_refused(link, evil, asked, {empty.object_id: ArrayRecord().deflate()})
    require_served(link, link.nodes)


def test_no_reply_is_made_of_replies(link: Link) -> None:
    """Each of those before it: a tree that doubles with every reply."""
    evil, *others = link.nodes
    asked = [link.send(node) for node in link.nodes]
    first = link.answer(link.fetch(evil), vector()[1])
    link.hand_in(evil, first)
    for node, reply_to in zip(others, asked[1:], strict=True):
        name, content = made_up("Message", [first.object_id])
        link.reply(node, link.fetch(node), [get_object_tree(first)], root=name)
        said = require_refused(link, node, reply_to, contents(first) | {name: content})
        assert "no piece of it is one" in said
    (reply,) = link.pull(asked[0])
    assert not reply.has_error()


def test_pieces_that_name_each_other_are_counted_as_often_as_they_are_named(link: Link) -> None:
    """Three that name the three below, and so on: 3^6 paths are no reply."""
    evil = link.nodes[0]
    link.send(evil)
    below: list[ObjectTree] = []
    for _ in range(6):
        names = [made_up("ArrayRecord", [tree.object_id for tree in below])[0] for _ in range(3)]
        below = [ObjectTree(object_id=name, children=below) for name in names]
    with pytest.raises(FlowerError, match="at most 160 pieces, 8 deep"):
        link.reply(evil, link.fetch(evil), below)


def test_bytes_that_are_no_piece(link: Link) -> None:
    evil = link.nodes[0]
    unknown, wrong = made_up("Nonsense", [])[1], made_up("Array", [])[1] + b"more"
    for content in (b"", b"\x00", b"Array", b"Array \xff x\x00", b"no" * 50, unknown, wrong):
        asked, name = link.send(evil), get_object_id(content)
        link.reply(evil, link.fetch(evil), trees([name]))
        require_refused(link, evil, asked, {name: content})
    asked, name = link.send(evil), "a" * 64
    link.reply(evil, link.fetch(evil), trees([name]))
    said = require_refused(link, evil, asked, {name: next(iter(chunks(1).values()))})
    assert "named by the hash of its content" in said
    require_served(link, link.nodes)


@pytest.mark.parametrize(
    "claims", [{"message_type": ""}, {"message_type": "evil. x"}, {"run_id": 5}, {"ttl": 1e9}]
)
def test_claims_that_flower_stumbles_over(link: Link, claims: dict[str, Any]) -> None:
    """The whole reply is refused, and the server does not wait for another."""
    evil = link.nodes[0]
    asked = link.send(evil)
    name, content = made_up("Message", [])
    link.reply(evil, link.fetch(evil), [], root=name, **claims)
    require_refused(link, evil, asked, {name: content})
    require_served(link, link.nodes)
