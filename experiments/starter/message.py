"""Flower's own `flwr-clientapp`: run for one message, or kept imported and forked for each.

    python -P message.py WORDS                       one message, with Flower's arguments
    python -P message.py --serve FOLDER OWNER-PID    until the owner ends, fork for whoever asks

The console script imports the package `flwr.supernode.cli`, whose `__init__` also imports the whole
SuperNode: SQLAlchemy, alembic and the web server, about 0.8 s of CPU (Flower 1.41) that no message
uses. Here that one `__init__` is skipped; the command that runs is Flower's, unchanged. If Flower
is laid out differently, its plain command runs.

Imports nothing of this project: a message loads the ClientApp that its server sent.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import struct
import sys
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NAME, SOCKET = "flwr-clientapp", "start.sock"
MAX_REQUEST_BYTES = 1 << 22
POLL_S, READ_TIMEOUT_S = 1.0, 10.0
LENGTH, CREDENTIALS = struct.Struct("!I"), struct.Struct("3i")
_PACKAGE = "flwr.supernode.cli"

Command = Callable[[], None]


def load() -> Command:
    """Import Flower's command, without what only a SuperNode needs."""
    import flwr.supernode

    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(Path(path) / "cli") for path in flwr.supernode.__path__]
    sys.modules[_PACKAGE] = package
    try:
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    except ImportError:
        del sys.modules[_PACKAGE]
        from flwr.supernode.cli import flwr_clientapp
    return flwr_clientapp


def serve(folder: Path, owner: int) -> None:
    """Fork for each request until process `owner`, the parent of this one, has ended.

    This process stays single-threaded and runs nothing of a message itself.
    """
    listener = _listen(folder)
    if os.getppid() != owner:
        return
    command = load()
    gc.freeze()  # what is imported stays shared memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are collected by the kernel
    while os.getppid() == owner:
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection:
                if _is_me(connection) and os.fork() == 0:
                    listener.close()
                    _run_child(connection, command)


def _listen(folder: Path) -> socket.socket:
    """Bind before anything slow is done: who asks meanwhile waits for it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    (folder / SOCKET).unlink(missing_ok=True)
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a Unix address has 108 bytes at most
    listener.bind(f"/proc/self/fd/{place}/{SOCKET}")
    os.close(place)
    listener.listen(16)
    listener.settimeout(POLL_S)
    return listener


def _is_me(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return bool(CREDENTIALS.unpack(raw)[1] == os.getuid())


def _run_child(connection: socket.socket, command: Command) -> None:
    """Become the process of one message; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _become(connection)
        random.seed()
        command()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # the process's edge, as in any program
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(connection: socket.socket) -> None:
    """Take over arguments, environment, folder and output of the program that asked."""
    connection.settimeout(READ_TIMEOUT_S)
    head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    (size,) = LENGTH.unpack(head)
    if size > MAX_REQUEST_BYTES or len(files) != 3:
        raise ValueError(f"a request of {size} bytes with {len(files)} files; expected 3")
    with connection.makefile("rb") as stream:
        request = json.loads(stream.read(size))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [NAME, *request["words"]]
    connection.sendall(b"1")
    connection.close()


def main() -> None:
    """Serve, or run Flower's command line for one message."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        load()()


if __name__ == "__main__":
    main()
