"""Replies at a SuperLink: none is seen before it is whole, and nothing that fails loses one."""

from threading import Semaphore
from typing import Any

import pytest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from experiments.deploy.guard import MOST_FAILURES, BusyError, NotStoredError
from tests.support.link import Link, vector


def test_a_reply_is_whole_before_anybody_sees_it(link: Link) -> None:
    """The server does not wait for pieces, and what is half there is in nobody's way."""
    node = link.nodes[0]
    sent, answer = link.ask(node)
    before = link.num_pieces()
    response, parts = link.announce(node, answer), get_all_nested_objects(answer)
    for name in response.objects_to_push:
        assert link.num_pieces() == before
        assert link.pull(sent) == []
        assert link.push(node, response.session_id, name, parts[name].deflate())
    name = response.objects_to_push[-1]
    assert link.push(node, response.session_id, name, parts[name].deflate()), "said twice"
    (reply,) = link.pull(sent)
    assert not reply.has_error()


def test_a_node_that_did_not_hear_the_answer_goes_on(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks again; a reply that could not be stored is stored when it asks the next time."""
    node = link.nodes[0]
    sent, answer = link.ask(node)
    first, *others = link.announce(node, answer).objects_to_push
    parts = {name: one.deflate() for name, one in get_all_nested_objects(answer).items()}
    link.push(node, sent, first, parts[first])
    assert list(link.announce(node, answer).objects_to_push) == others

    with monkeypatch.context() as busy:
        busy.setattr(link.state, "store_object", lambda *_: False)  # as Flower's, of any error
        for name in others[:-1]:
            link.push(node, sent, name, parts[name])
        for _ in range(MOST_FAILURES - 1):
            with pytest.raises(NotStoredError, match="a piece was not stored"):
                link.push(node, sent, others[-1], parts[others[-1]])
        assert link.pull(sent) == []
    assert not link.announce(node, answer).objects_to_push
    (reply,) = link.pull(sent)
    assert not reply.has_error()


def test_what_the_database_never_takes_is_given_up(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = link.nodes[0]
    sent, answer = link.ask(node)
    monkeypatch.setattr(link.state, "store_object", lambda *_: False)
    with pytest.raises(NotStoredError):
        link.hand_in(node, answer)
    for _ in range(MOST_FAILURES - 1):
        with pytest.raises(NotStoredError):
            link.announce(node, answer)
    with pytest.raises(FlowerError, match="no such message"):
        link.announce(node, answer)
    (reply,) = link.pull(sent)
    assert reply.has_error(), "the server waits no longer"


def test_only_some_wait_for_their_turn(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a thread of the SuperLink; more are told to come again, and lose nothing."""
    monkeypatch.setattr(link.guard, "_waiting", Semaphore(0))
    node = link.nodes[0]
    sent, answer = link.ask(node)
    for _ in range(2 * MOST_FAILURES):
        with pytest.raises(BusyError, match="many replies"):
            link.hand_in(node, answer)
    monkeypatch.undo()
    assert not link.announce(node, answer).objects_to_push
    (reply,) = link.pull(sent)
    assert not reply.has_error()


def test_a_reply_outlives_a_restart(link: Link) -> None:
    """What was taken is not given up because the node repeats itself."""
    node = link.nodes[0]
    sent, answer = link.ask(node)
    parts = {name: one.deflate() for name, one in get_all_nested_objects(answer).items()}
    *_, last = link.announce(node, answer).objects_to_push
    link.hand_in(node, answer)
    link.restart()
    assert link.push(node, sent, last, parts[last])
    assert not link.announce(node, answer).objects_to_push
    (reply,) = link.pull(sent)
    assert not reply.has_error()
    assert link.num_pieces() == 0


def test_a_piece_that_comes_just_now_counts(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for idle replies and the end of one, its last piece may come."""
    node = link.nodes[0]
    sent, answer = link.ask(node)
    link.announce(node, answer)
    idle = link.guard._inbox.idle

    def meanwhile() -> Any:
        monkeypatch.undo()
        monkeypatch.setattr("experiments.deploy.inbox.IDLE_S", -1.0)
        found = idle()
        assert found
        link.hand_in(node, answer)
        return found

    monkeypatch.setattr(link.guard._inbox, "idle", meanwhile)
    (reply,) = link.pull(sent)
    assert not reply.has_error()


def test_a_disk_that_is_full_ends_one_reply(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    node = link.nodes[0]
    sent, answer = link.ask(node)

    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("experiments.deploy.inbox.SpooledTemporaryFile.write", write)
        with pytest.raises(FlowerError, match="No space left"):
            link.hand_in(node, answer)
    (reply,) = link.pull(sent)
    assert reply.has_error()
    sent = link.send(node)
    link.hand_in(node, link.answer(link.fetch(node), vector()[1]))
    (reply,) = link.pull(sent)
    assert not reply.has_error()


@pytest.mark.parametrize("how", ["another", "idle", "restart"])
def test_the_server_is_told_that_a_reply_will_not_come(
    link: Link, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Where its node hands in another, pushes no more, or the SuperLink has forgotten it."""
    node = link.nodes[0]
    sent, answer = link.ask(node)
    name = link.announce(node, answer).objects_to_push[0]
    piece = get_all_nested_objects(answer)[name].deflate()
    assert link.push(node, sent, name, piece)
    if how == "another":
        link.send(node)
        link.announce(node, link.answer(link.fetch(node)))
    elif how == "idle":
        monkeypatch.setattr("experiments.deploy.inbox.IDLE_S", -1.0)
    else:
        guard = fleet_handlers.push_object.__self__
        monkeypatch.setattr(guard, "_inbox", type(guard._inbox)())
        with pytest.raises(FlowerError):
            link.push(node, sent, name, piece)
    (reply,) = link.pull(sent)
    assert reply.has_error()


def test_a_reply_is_taken_and_its_message_deleted_together(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is busy in between would have lost it."""
    node = link.nodes[0]
    sent = link.send(node)
    link.hand_in(node, link.answer(link.fetch(node)))
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
