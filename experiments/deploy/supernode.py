"""A participant's SuperNode, whose own API nobody else on the machine can use.

A SuperNode serves the processes of its ClientApp on loopback. As Flower starts it, whoever has an
account on the machine may take the participant's messages there and answer in its name. This one
speaks TLS with a certificate of its own, made anew at each start, and gives tasks to the SuperExec
that knows its secret, which is started beside it. `node_guard` and `node_bounds` change the rest.
"""

from __future__ import annotations

import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from common.files import PRIVATE, closed_folder, replace_file
from experiments.deploy.certificates import self_signed

HOST = "127.0.0.1"
MOST_FILES = 65_536
PYTHON = (sys.executable, "-P", "-m")
"""Without what lies in the folder that it is started in."""


def command(folder: Path, port: int, words: Sequence[str]) -> list[str]:
    """Return the command line that starts a SuperNode with its API on a port of loopback.

    `words` are those of `flower-supernode`; certificate and secret go to `folder`.
    """
    return [*PYTHON, __name__, str(folder), "--host", HOST, "--port", str(port), *words]


def main() -> None:
    """Run the SuperNode of this command line: a folder, `--host`, `--port`, and its own words."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from experiments.deploy import node_bounds, node_guard

    node_guard.install()
    node_bounds.install()
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    address = f"{words[1]}:{words[3]}"
    _more_connections()
    flags = _api_secrets(folder)
    executor = [*PYTHON, "experiments.deploy.executor", "--runtime-api-address", address]
    executor += ["--root-certificates", flags["--ssl-ca-certfile"]]
    executor += ["--superexec-auth-secret-file", flags["--superexec-auth-secret-file"]]
    process = subprocess.Popen([*executor, "--parent-pid", str(os.getpid())])
    threading.Thread(target=_end_with, args=(process,), daemon=True).start()
    own = [word for pair in flags.items() for word in pair]
    sys.argv = ["flower-supernode", *words, "--isolation", "process", *own]
    flower_supernode()


def _end_with(executor: subprocess.Popen[bytes]) -> None:
    """End this SuperNode when its SuperExec ends: `join` starts both again."""
    executor.wait()
    print("the SuperExec has ended, and so does the SuperNode", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _more_connections() -> None:
    """Let this process hold as many connections as it may: others of the machine can open some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_FILES), hard))


def _api_secrets(folder: Path) -> dict[str, str]:
    """Write a certificate, its key and a secret for one run of the API; return them as flags."""
    authority, certificate, key = self_signed(HOST)
    files = {
        "--ssl-ca-certfile": authority,
        "--ssl-certfile": certificate,
        "--ssl-keyfile": key,
        "--superexec-auth-secret-file": secrets.token_bytes(32),
    }
    closed_folder(folder)
    for flag, content in files.items():
        replace_file(folder / flag.lstrip("-"), content, mode=PRIVATE)
    return {flag: str(folder / flag.lstrip("-")) for flag in files}


if __name__ == "__main__":
    main()
