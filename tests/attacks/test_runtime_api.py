"""Others with an account on a participant's machine: they take no message and read no token."""

import http.client
import os
import signal
import ssl
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
from flwr.proto.runtime_pb2 import AcquireTaskRequest

from experiments.deploy import supernode
from experiments.deploy.executor import start_task
from experiments.run.engines.processes import free_port
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


def test_a_token_is_on_no_command_line() -> None:
    command = [sys.executable, "-c", READ, "--token", TOKEN, "--insecure"]
    with start_task(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = " ".join(map(str, process.args))  # type: ignore[arg-type]
        assert process.stdout.read().decode().strip() == TOKEN
    assert TOKEN not in line
    assert line.endswith("--insecure")
