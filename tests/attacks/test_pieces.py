"""Pieces at a SuperLink: nobody spoils, steals, floods with or leaves behind those of others."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.superlink.servicer.fleet import fleet_handlers

from experiments.deploy.pieces import is_whole
from tests.support.link import Link, chunks, guarded_link, trees, vector


def test_an_honest_exchange_is_as_ever(link: Link) -> None:
    """Many get one vector and answer with one; each reply comes; nothing is left behind."""
    for _ in range(2):
        sent = [link.send(node, vector()[1]) for node in link.nodes]
        for node in link.nodes:
            message = link.fetch(node)
            link.confirm(node, message.metadata.message_id)
            link.hand_in(node, link.answer(message, vector()[1]))
        found = link.pull(*sent)
        assert [reply.has_error() for reply in found] == [False, False]
        assert found[0].content["arrays"]["global-theta"].numpy().shape == (500,)
    assert link.num_pieces() == 0


def test_many_nodes_at_once_lose_no_reply(tmp_path: Path) -> None:
    """All of them share pieces, which come and go while others hand theirs in."""
    with guarded_link(tmp_path, nodes=6) as link:

        def take_part(node: int) -> bool:
            sent = link.send(node, vector()[1])
            message = link.fetch(node)
            link.confirm(node, message.metadata.message_id)
            link.hand_in(node, link.answer(message, vector()[1]))
            while not (found := link.pull(sent)):
                time.sleep(0.01)
            return bool(found[0].has_error())

        with ThreadPoolExecutor(len(link.nodes)) as pool:
            for _ in range(5):
                assert not any(pool.map(take_part, link.nodes))
        assert link.num_pieces() == 0


def test_a_message_is_not_confirmed_before_it_is_there(link: Link) -> None:
    """It would be deleted under the hands of the server, and end the run."""
    node = link.nodes[0]
    sent = link.send(node, whole=False)
    with pytest.raises(FlowerError, match="confirmed before all of it is there"):
        link.confirm(node, sent)
    link.confirm(node, "0" * 64)  # one that is gone


def test_a_node_stores_no_more_than_a_reply(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its message allows, and what a reply has beside its arrays."""
    monkeypatch.setattr("experiments.deploy.inbox.ROOM", 1000)
    evil = link.nodes[0]
    for most, fits in ((12_000, True), (4000, False)):
        sent = link.send(evil, most_bytes=most)
        answer = link.answer(link.fetch(evil), RecordDict({"arrays": ArrayRecord({
            str(seed): vector(seed)[0] for seed in range(5)})}))  # fmt: skip
        if fits:
            link.hand_in(evil, answer)
        else:
            with pytest.raises(FlowerError, match="more than 5,000 bytes"):
                link.hand_in(evil, answer)
        (reply,) = link.pull(sent)
        assert reply.has_error() is not fits, "the server waits no longer"
        assert link.num_pieces() == 0


def all_named(tree: ObjectTree) -> list[ObjectTree]:
    return [tree, *(piece for child in tree.children for piece in all_named(child))]


def test_a_piece_in_two_places_is_stored_once(link: Link) -> None:
    """The reply is whole with it; nobody keeps the database with writing it again and again."""
    node = link.nodes[0]
    sent = link.send(node, most_bytes=2**25)
    # cut into pieces of 5 MB, the second of which they share; the first says how long they are
    lengths = {"1": 2_700_000, "2": 2_700_001}
    made = {name: Array(np.zeros(length, np.float32)) for name, length in lengths.items()}
    content = RecordDict({"arrays": ArrayRecord(made)})
    answer = link.answer(link.fetch(node), content)
    wanted = link.announce(node, answer).objects_to_push
    children = [piece.object_id for piece in all_named(get_object_tree(answer))]
    assert len(wanted) == len(set(children)) == len(children) - 1
    link.hand_in(node, answer)
    (reply,) = link.pull(sent)
    assert not reply.has_error()
    assert reply.content["arrays"]["2"].numpy().shape == (2_700_001,)
    assert link.num_pieces() == 0


def test_a_piece_is_pushed_for_ones_own_reply(link: Link) -> None:
    evil, good = link.nodes
    sent, answer = link.ask(good)
    parts = get_all_nested_objects(answer)
    names = link.announce(good, answer).objects_to_push
    for stolen in ("", sent, "f" * 64):
        with pytest.raises(FlowerError, match="after its reply was announced"):
            link.push(evil, stolen, names[0], parts[names[0]].deflate())
    for name in names:
        assert link.push(good, sent, name, parts[name].deflate())
    (reply,) = link.pull(sent)
    assert not reply.has_error()


def test_a_node_gets_the_pieces_of_its_own_messages(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who guesses a piece of another's reply (counts of classes) is not told that it is there."""
    evil, good = link.nodes
    link.send(evil, vector(2)[1])
    sent = link.send(good, vector()[1])
    message = link.fetch(good)
    names = list(get_all_nested_objects(vector()[0]))
    assert all(link.get(good, name) for name in names)
    link.fetch(evil)
    assert [link.get(evil, name) for name in names] == [None] * len(names)
    guard = fleet_handlers.push_object.__self__
    monkeypatch.setattr(guard, "_given", {})  # after a restart
    assert all(link.get(good, name) for name in (*names, sent))
    assert [link.get(evil, name) for name in names] == [None] * len(names)
    answer = link.answer(message, vector(3)[1])
    link.hand_in(good, answer)
    assert not any(link.get(evil, name) for name in get_all_nested_objects(answer))
    (reply,) = link.pull(sent)
    assert not reply.has_error()


def test_a_message_is_not_deleted_while_it_is_pushed(link: Link) -> None:
    """Flower gives it out before all of it is there; the server would push to nobody."""
    node = link.nodes[0]
    sent, before = link.send(node, vector()[1], whole=False), link.num_pieces()
    name = next(iter(chunks(1)))
    link.reply(node, link.fetch(node), trees([name]))
    with pytest.raises(FlowerError, match="named by the hash"):
        link.push(node, sent, name, b"something else")
    assert link.num_pieces() == before
    assert sent in link.state.object_store


def test_pieces_go_with_their_message(link: Link) -> None:
    """Of a reply that comes too late, and of a message that is never confirmed."""
    evil, good = link.nodes
    for _ in range(3):
        sent = link.send(evil, vector()[1])
        answer = link.answer(link.fetch(evil), vector(2)[1])
        answer.metadata.__dict__["_ttl"] = 0.5
        answer.metadata.__dict__["_message_id"] = answer.object_id
        link.hand_in(evil, answer)
        time.sleep(0.6)
        (failed,) = link.pull(sent)
        assert failed.has_error()
        with pytest.raises(FlowerError, match="no such message to reply to"):
            link.announce(evil, answer)
        other = link.send(good)
        link.pull(other)
        link.confirm(good, other)
        assert link.pull(other) == []
    assert not is_whole(link.state.object_store, sent)
    assert link.num_pieces() == 0


def test_what_nobody_asks_after_goes_in_the_end(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.deploy.pieces.GRACE_S", -4000.0)
    link.send(link.nodes[0])
    assert link.num_pieces() > 0
    link.pull(link.send(link.nodes[1]))
    assert link.num_pieces() == 0
