"""What a node says of the pieces that it hands in: nobody has to believe it."""

import secrets

import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)

from experiments.deploy.pieces import is_whole
from tests.attacks.test_pieces import chunks, trees, vector
from tests.support.link import Link


def test_nor_by_who_calls_it_its_reply(link: Link) -> None:
    """A piece that others will have, as a message of junk that never comes."""
    evil, good = link.nodes
    for node in link.nodes:
        link.send(node)
    array, junk = vector()[0], chunks(3)
    message = link.fetch(evil)
    session = link.reply(evil, message, trees(junk), root=array.object_id, ttl=3000.0).session_id
    for name, piece in junk.items():
        assert link.push(evil, session, name, piece)
    session = link.reply(good, link.fetch(good), [get_object_tree(array)], ttl=3000.0).session_id
    for name, piece in get_all_nested_objects(array).items():
        assert link.push(good, session, name, piece.deflate())
    assert is_whole(link.state.object_store, array.object_id)
    assert not any(name in link.state.object_store for name in junk)


def test_pieces_that_name_each_other_unfold_to_nothing(link: Link) -> None:
    """Three that name the three below, and so on: 3^12 paths, of which the database has none."""
    evil = link.nodes[0]
    link.send(evil)
    below: list[str] = []
    made: dict[str, bytes] = {}
    for _ in range(12):
        level = {}
        for _ in range(3):
            head = HEAD_VALUE_DIVIDER.join(("ArrayRecord", ",".join(below), "8"))
            content = head.encode() + HEAD_BODY_DIVIDER + secrets.token_hex(4).encode()
            level[get_object_id(content)] = content
        made |= level
        below = [*level]
    root = secrets.token_hex(32)
    session = link.reply(evil, link.fetch(evil), trees(made), root=root, ttl=3000.0).session_id
    for name, content in made.items():
        assert link.push(evil, session, name, content)
    tree = link.state.object_store.get_object_tree(root)
    assert len([*iterate_object_tree(tree)]) == 1 + 36


def test_what_a_node_says_of_a_piece_is_not_believed(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its false pieces go with its reply; who has the same piece is not refused for them."""
    evil, good = link.nodes
    array, content = vector()
    asked = link.send(evil)
    junk = chunks(3)
    false = ObjectTree(object_id=array.object_id, children=trees(junk))
    message = link.fetch(evil)
    session = link.reply(evil, message, [false], ttl=3000.0).session_id
    for name, piece in junk.items():
        assert link.push(evil, session, name, piece)
    link.send(good)
    pieces = get_all_nested_objects(array)
    tree = get_object_tree(array)
    session = link.reply(good, link.fetch(good), [tree], ttl=3000.0).session_id
    for name, piece in reversed(pieces.items()):
        assert link.push(good, session, name, piece.deflate())
    assert is_whole(link.state.object_store, array.object_id)
    sent = link.send(good, content)
    assert is_whole(link.state.object_store, sent)
    assert all(name in link.state.object_store for name in junk)
    monkeypatch.setattr("common.inflation.PATIENCE_S", -1.0)  # the reply itself never comes
    (refused,) = link.pull(asked)
    assert refused.has_error()
    assert not any(name in link.state.object_store for name in junk)
