"""A participant's SuperNode, whose own API nobody else on the machine can use.

A SuperNode serves the processes of its ClientApp on loopback. As Flower starts it, whoever has an
account on the machine may take the participant's messages there and answer in its name. This one
speaks TLS with a certificate of its own, made anew at each start, and gives tasks to the SuperExec
that knows its secret, which is started beside it. `node_guard` and `node_bounds` change the rest.

Flower's loop ends at the first answer it does not expect, and a process whose loop has ended would
live on and do nothing; this one ends with it, and `join` starts it again.
"""

from __future__ import annotations

import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

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


def main() -> NoReturn:
    """Run the SuperNode of this command line: a folder, `--host`, `--port`, and its own words."""
    code: object = 1  # of a loop that came to an end
    try:
        _run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    _leave(code if isinstance(code, int) else int(code is not None))


def _run() -> None:
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from experiments.deploy import heartbeat, node_bounds, node_guard

    for part in (node_guard, node_bounds, heartbeat):
        part.install()
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


def _leave(code: int) -> NoReturn:
    """End this process and what it started, whichever of Flower's threads are still there."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    for process in reversed(psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            process.kill()
    os._exit(code)


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
