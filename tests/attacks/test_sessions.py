"""The sessions in which the server pushes the pieces of several nodes' messages at once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers as fleet
from flwr.superlink.servicer.runtime import runtime_handlers as runtime
from sqlalchemy import text

from common.messages import TRAIN, Recipient
from common.records import Content
from experiments.deploy.pieces import is_whole
from server_app.transport import Outgoing, Transport
from tests.support.link import Link, guarded_link


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    with guarded_link(tmp_path, nodes=4) as opened:
        yield opened


def transport(link: Link, before_first_piece: Callable[[], None]) -> Transport:
    """Flower's own grid over the handlers; something happens before the first piece is pushed."""
    waiting = [before_first_piece]

    def push_object(request: Any) -> Any:
        if waiting:
            waiting.pop()()
        return runtime.push_object(request, link.state, link.task)

    grid = HttpGrid(token="x")
    grid._client = SimpleNamespace(
        PushMessages=lambda r: runtime.push_messages(r, link.state, link.task),
        PushObject=push_object,
        PullMessages=lambda r: runtime.pull_messages(r, link.state, link.task),
    )
    grid._run = SimpleNamespace(run_id=link.run)
    return Transport(grid, "mh-pfedhn")


def messages(sender: Transport, nodes: list[int]) -> list[Outgoing]:
    rng = np.random.default_rng(0)
    return [
        sender.message(
            TRAIN,
            Recipient(f"c{number}", node, 2**20),
            Content({"a": 1}, {"theta": rng.standard_normal(5000).astype(np.float32)}),
            server_round=1,
        )
        for number, node in enumerate(nodes)
    ]


def require_whole(link: Link, sender: Transport, nodes: list[int]) -> None:
    """Every node gets one message, which the server waits for, and all of it is there."""
    assert len(sender) == len(link.nodes)
    for node in nodes:
        got = fetched(node, link)
        assert [m.metadata.message_id in sender._in_flight for m in got] == [True]
        assert is_whole(link.state.object_store, got[0].metadata.message_id)


def fetched(node: int, link: Link) -> list[Any]:
    request = PullMessagesRequest(node=Node(node_id=node))
    store = link.state.object_store
    found = fleet.pull_messages(request=request, state=link.state, store=store)
    return list(found.messages_list)


@pytest.mark.parametrize("as_piece", [False, True])
def test_a_node_does_not_announce_the_message_that_it_gets(link: Link, as_piece: bool) -> None:
    """Flower gives it out before its pieces are there, and would end the session of all of them."""
    evil, *good = link.nodes

    def announce() -> None:
        message = link.fetch(evil)
        mine = message.metadata.message_id
        if as_piece:  # it is a piece of nothing, whatever comes of it
            link.reply(evil, message, [ObjectTree(object_id=mine)])
        else:
            with pytest.raises(FlowerError, match="no message of the server's"):
                link.reply(evil, message, [], root=mine)

    sender = transport(link, announce)
    sender.send(messages(sender, link.nodes))
    require_whole(link, sender, good)


def test_what_a_node_was_given_is_what_is_sent_again(link: Link) -> None:
    """A batch that fails is sent again one by one: nobody is left with half of a message."""

    def fail() -> None:
        raise ObjectPushError("f" * 64, 1, "session")

    sender = transport(link, fail)
    sender.send(messages(sender, link.nodes))
    require_whole(link, sender, link.nodes)


def test_what_answers_nothing_leaves_nothing(link: Link) -> None:
    evil = link.nodes[0]
    link.send(evil)
    message, before = link.fetch(evil), sessions(link)
    for made_up in ("f" * 64, "\x1b]0;owned\x07", "a" * 63):
        with pytest.raises(FlowerError, match=r"no such message|answers none"):
            link.reply(evil, message, [], reply_to_message_id=made_up)
    link.reply(evil, message, [])
    assert sessions(link) == before
    link.hand_in(evil, link.answer(message))
    assert sessions(link) == before, "all of it came"


def sessions(link: Link) -> int:
    with link.state.session() as session:
        return int(session.scalar(text("SELECT COUNT(*) FROM object_push_sessions")))
