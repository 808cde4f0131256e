"""Others with an account on a participant's machine, and answers of its server.

They take no message, read no token, and cost no memory.
"""

import gzip
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from experiments.deploy import node_bounds, supernode
from experiments.deploy.executor import start_task
from experiments.run.engines.processes import free_port
from tests.support.answering import answering
from tests.support.deployment import wait_until

TOKEN = "ab" * 128
READ = "import sys; at = sys.argv.index('--token-file'); print(open(sys.argv[at + 1]).read())"


def asked(port: int, *, secure: bool) -> int:
    """Ask the API of a SuperNode for a task, as its SuperExec does; return the HTTP status."""
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    connection: http.client.HTTPConnection = (
        http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=unverified)
        if secure
        else http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    )
    body = AcquireTaskRequest(supported_task_types=["flwr-clientapp"]).SerializeToString()
    headers = {"Content-Type": "application/protobuf"}
    with closing(connection):
        connection.request("POST", "/v1/runtime/acquire-task", body, headers)
        return connection.getresponse().status


def test_a_supernode_gives_its_tasks_to_nobody_else(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "api"
    words = ["--insecure", "--superlink", "127.0.0.1:9", "--node-config", 'client-id="a"']
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            supernode.command(folder, port, words), stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr")},
        )  # fmt: skip
    try:
        statuses: list[int] = []

        def answers() -> bool:
            with suppress(OSError):
                statuses.append(asked(port, secure=True))
            return bool(statuses)

        wait_until(answers, 60, "the API answers")
        assert statuses == [401]
        with suppress(OSError, http.client.HTTPException):
            assert asked(port, secure=False) == 0, "it has no other form"
        assert folder.stat().st_mode & 0o077 == 0
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
        secret = (folder / "superexec-auth-secret-file").read_bytes()
        executor = psutil.Process(process.pid).children()[0]
        time.sleep(1.0)
        assert executor.is_running(), "its own SuperExec is let in"
        for line in (process.args, executor.cmdline()):
            assert secret.hex() not in " ".join(map(str, line))  # type: ignore[arg-type]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def opened(port: int, head: str = "") -> ssl.SSLSocket:
    """Connect as anybody on the machine can, and begin to ask something."""
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    found = unverified.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=30))
    found.sendall(head.encode())
    return found


def test_others_cost_it_no_memory_and_hold_no_connection(tmp_path: Path) -> None:
    port = free_port()
    words = ["--insecure", "--superlink", "127.0.0.1:9", "--node-config", 'client-id="a"']
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            supernode.command(tmp_path / "api", port, words), stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr")},
        )  # fmt: skip
    try:

        def answers() -> bool:
            with suppress(OSError):
                return asked(port, secure=True) == 401
            return False

        wait_until(answers, 60, "the API answers")
        head = (
            "POST /v1/runtime/acquire-task HTTP/1.1\r\nHost: x\r\n"
            "Content-Type: application/protobuf\r\nContent-Length: 1000000000\r\n"
        )
        idle, slow = opened(port), opened(port, f"{head}\r\na")
        before = psutil.Process(process.pid).memory_info().rss
        for token in ("", f"flwr-task-token: {TOKEN}\r\n"):
            with closing(opened(port, f"{head}{token}\r\n")) as large, suppress(OSError):
                for _ in range(128):
                    large.sendall(bytes(1 << 20))
                assert psutil.Process(process.pid).memory_info().rss - before < 40 << 20
        for held in (idle, slow):
            with closing(held), suppress(ConnectionError, ssl.SSLError):
                assert held.recv(100)[:12] in (b"", b"HTTP/1.1 413")
        assert asked(port, secure=True) == 401
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's clients be those of a SuperNode."""
    monkeypatch.setattr(node_bounds, "MOST_ANSWER", 10_000)
    guarded = node_bounds.hardened(ProtobufClient.__init__)
    monkeypatch.setattr(ProtobufClient, "__init__", guarded)


ANSWERS = {
    "plain": ({"Content-Length": "10000"}, bytes(10_000)),
    "long": ({"Content-Length": "10001"}, bytes(10_001)),
    "unsaid": ({}, bytes(100_000)),
    "packed": ({"Content-Encoding": "gzip"}, gzip.compress(bytes(5_000))),
}


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("plain", None),
        ("long", "more than 10,000 bytes"),
        ("unsaid", "more than 10,000 bytes"),
        ("packed", "packed its answer"),
        ("moved", "307"),
    ],
)
def test_an_answer_is_bounded_and_from_the_server(node: None, kind: str, error: str | None) -> None:
    """One that is packed, endless, or sends the node to another service of the participant's."""
    visited: list[str] = []

    def answer(path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        visited.append(path)
        assert headers["accept-encoding"] == "identity"
        if kind == "moved":
            return 307, {"Location": "/admin/shutdown"}, b""
        return 200, *ANSWERS[kind]

    with (
        answering(answer) as address,
        FleetHttpClient.from_server_address(address, True, None, []) as client,
        pytest.raises((httpx.HTTPError, ValueError), match=error or "Invalid protobuf"),
    ):
        client.GetRun(GetRunRequest(run_id=1))
    assert len(visited) == 1


def test_a_token_is_on_no_command_line() -> None:
    command = [sys.executable, "-c", READ, "--token", TOKEN, "--insecure"]
    with start_task(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = " ".join(map(str, process.args))  # type: ignore[arg-type]
        assert process.stdout.read().decode().strip() == TOKEN
    assert TOKEN not in line
    assert line.endswith("--insecure")
