"""A server that answers wrongly once: its participant comes again, and keeps no more than fits."""

import io
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.common.constant import ErrorCode
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from rich.console import Console

from experiments.deploy import node_bounds, node_guard, supernode, supervise
from experiments.deploy.supervise import Supervisor
from experiments.run.engines.processes import free_port, is_alive
from tests.support.deployment import wait_until
from tests.support.joining import settings
from tests.support.node import Node, identity, packed, question, take
from tests.support.wrong_superlink import Answer, WrongSuperLink, wrong_superlink

__all__ = ["identity"]

UNKNOWN = SendNodeHeartbeatResponse(success=False).SerializeToString()


@contextmanager
def started(folder: Path, link: WrongSuperLink) -> Iterator[subprocess.Popen[bytes]]:
    """Start the SuperNode of a participant, without who would start it again."""
    words = ["--insecure", "--superlink", link.address, "--node-config", 'client-id="a"']
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            supernode.command(folder / "api", free_port(), words), stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, "FLWR_HOME": str(folder / "flwr")},
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def left_of(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and is_alive(process):
                found.append(process)
    return found


@pytest.mark.parametrize("answer", [(500, b""), (200, b"no protobuf")])
def test_a_supernode_ends_with_its_loop(tmp_path: Path, answer: Answer) -> None:
    """And all that it started; it would stay, and ask for nothing."""
    with (
        wrong_superlink({"pull-messages": [answer]}) as link,
        started(tmp_path, link) as process,
    ):
        wait_until(lambda: process.poll() is not None, 60, "it has ended")
        assert process.returncode == 1
        wait_until(lambda: not left_of(process.pid), 10, "what it started has ended too")
        assert link.asked.count("pull-messages") == 1
        assert link.asked[-1] == "unregister-node", "it took its leave"


def test_its_heart_beats_on_or_it_ends(tmp_path: Path) -> None:
    """It would ask for messages, and get none, for to its server it is away."""
    wrong = {"send-node-heartbeat": [(500, b""), (200, UNKNOWN)]}
    with wrong_superlink(wrong) as link, started(tmp_path, link) as process:
        wait_until(lambda: process.poll() is not None, 60, "it has ended")
        assert link.asked.count("send-node-heartbeat") == 2
        assert "no heartbeat any more" in (tmp_path / "log").read_text()


def test_a_participant_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.1)
    with wrong_superlink({"pull-messages": [(500, b"")]}) as link:
        own = settings(tmp_path, server=link.address)
        own.folder.mkdir(parents=True)
        supervisor = Supervisor(own, Console(file=io.StringIO()))

        def leave_when_back() -> None:
            try:
                wait_until(lambda: link.asked.count("pull-messages") > 1, 60, "it asks again")
            finally:
                supervisor._leave()

        watcher = threading.Thread(target=leave_when_back)
        watcher.start()
        assert supervisor.run() == 0
        watcher.join()
    assert link.asked.count("pull-messages") > 1
    assert link.asked.count("activate-node") == 2
    assert "pull-messages" in (own.folder / "trouble.json").read_text()


@pytest.fixture
def hardened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's clients be those of a SuperNode."""
    guarded = node_bounds.hardened(ProtobufClient.__init__)
    monkeypatch.setattr(ProtobufClient, "__init__", guarded)


def tree(pieces: int, name: str) -> ObjectTree:
    return ObjectTree(object_id=name, children=[ObjectTree(object_id=name)] * (pieces - 1))


def messages(found: ObjectTree) -> bytes:
    return PullMessagesResponse(message_object_trees=[found]).SerializeToString()


def test_the_largest_message_fits_in_an_answer(hardened: None) -> None:
    """All the names of its pieces together in one, and each piece, as the app, in its own."""
    piece = PullObjectResponse(object_content=bytes(6 << 20)).SerializeToString()
    app = GetFabResponse(fab=Fab(content=bytes(6 << 20))).SerializeToString()
    names = messages(tree(node_guard.MOST_PIECES, "f" * 64))
    assert len(names) < node_bounds.MOST_ANSWER / 16
    wrong = {"pull-messages": [(200, names)], "pull-object": [(200, piece)]}
    with (
        wrong_superlink(wrong | {"get-fab": [(200, app)]}) as link,
        FleetHttpClient.from_server_address(link.address, True, None, []) as client,
    ):
        (found,) = client.PullMessages(PullMessagesRequest()).message_object_trees
        assert len([*iterate_object_tree(found)]) == node_guard.MOST_PIECES
        assert len(client.PullObject(PullObjectRequest()).object_content) == 6 << 20
        assert len(client.GetFab(GetFabRequest()).fab.content) == 6 << 20


def test_one_of_empty_pieces_does_not(hardened: None) -> None:
    """Two bytes are one; as Python's objects they would be a hundred times as many."""
    with (
        wrong_superlink({"pull-messages": [(200, messages(tree(1 << 19, "")))]}) as link,
        FleetHttpClient.from_server_address(link.address, True, None, []) as client,
        pytest.raises(httpx.DecodingError, match="more than 1,048,576 bytes"),
    ):
        client.PullMessages(PullMessagesRequest())


@pytest.mark.usefixtures("identity")
def test_pieces_are_counted_no_further_than_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    node, counted = Node(monkeypatch), 0

    def counting(found: ObjectTree) -> Iterator[ObjectTree]:
        nonlocal counted
        for piece in iterate_object_tree(found):
            counted += 1
            yield piece

    monkeypatch.setattr(node_guard, "iterate_object_tree", counting)
    message, pieces, _ = question()
    assert take(node, packed(), (message, pieces, tree(100_000, ""))) is not None
    assert node.to_send()[-1].error.code == ErrorCode.INVALID_FAB
    assert counted < 2 * node_guard.MOST_PIECES


@pytest.mark.usefixtures("identity")
def test_the_pieces_of_a_message_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the message's name they are forgotten; its record in its place would stay for good."""
    node = Node(monkeypatch)
    message, pieces, names = question(size=1000)
    assert take(node, packed(), (message, pieces, names.children[0])) is not None
    assert node.to_send()[-1].error.code == ErrorCode.INVALID_FAB
    assert [name for name in pieces if name in node.state.object_store] == []
