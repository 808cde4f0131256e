"""Flower's own `flwr-clientapp` or `flwr-serverapp`: run once, or kept imported and forked.

    python -P message.py PROGRAM WORDS                       once, with Flower's arguments
    python -P message.py PROGRAM --serve FOLDER OWNER-PID    until the owner ends, for whoever asks

The console script imports the package `flwr.supernode.cli`, whose `__init__` also imports the whole
SuperNode (`flwr.superlink.cli` the SuperLink): SQLAlchemy, alembic and the web server, about 0.8 s
of CPU (Flower 1.41) that no message uses. Here that one `__init__` is skipped and Flower's command
runs unchanged. If Flower is laid out differently, its plain command runs.

Imports nothing of this project: a message loads the ClientApp that its server sent.
"""

from __future__ import annotations

import gc
import importlib
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

CLIENT, SERVER = "flwr-clientapp", "flwr-serverapp"
PACKAGES = {CLIENT: "flwr.supernode", SERVER: "flwr.superlink"}
MAX_REQUEST_BYTES = 1 << 22
POLL_S, READ_TIMEOUT_S = 1.0, 10.0
LENGTH, CREDENTIALS = struct.Struct("!I"), struct.Struct("3i")
Command = Callable[[], None]


def load(program: str) -> Command:
    """Import Flower's command, without what only a SuperNode or a SuperLink needs."""
    above, name = importlib.import_module(PACKAGES[program]), f"{PACKAGES[program]}.cli"
    function = program.replace("-", "_")
    package = types.ModuleType(name)
    package.__path__ = [str(Path(path) / "cli") for path in above.__path__]
    sys.modules[name] = package
    try:
        module = importlib.import_module(f"{name}.{function}")
    except ImportError:
        del sys.modules[name]
        module = importlib.import_module(name)
    command: Command = getattr(module, function)
    return command


def serve(program: str, folder: Path, owner: int) -> None:
    """Fork for each request until process `owner`, the parent of this one, has ended.

    This process stays single-threaded and runs nothing of a message itself. When the owner was
    killed, nobody is left to end what was forked: a ServerApp would go on holding its run's folder,
    and a message its participant's. So whatever this process leads ends with it.
    """
    listener = _listen(folder, f"{program}.sock")
    if os.getppid() != owner:
        return
    command = load(program)
    gc.freeze()  # what is imported stays shared memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are collected by the kernel
    while os.getppid() == owner:
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection:
                if _is_me(connection) and os.fork() == 0:
                    listener.close()
                    _run_child(connection, program, command)
    if os.getpgrp() == os.getpid():  # `Starter` gave it a session of its own
        os.killpg(0, signal.SIGKILL)


def _listen(folder: Path, name: str) -> socket.socket:
    """Bind before anything slow is done: who asks meanwhile waits for it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    (folder / name).unlink(missing_ok=True)
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a Unix address has 108 bytes at most
    listener.bind(f"/proc/self/fd/{place}/{name}")
    os.close(place)
    listener.listen(16)
    listener.settimeout(POLL_S)
    return listener


def _is_me(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return bool(CREDENTIALS.unpack(raw)[1] == os.getuid())


def _run_child(connection: socket.socket, program: str, command: Command) -> None:
    """Become the process of one message or run; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _become(connection, program)
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


def _become(connection: socket.socket, program: str) -> None:
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
    sys.argv = [program, *request["words"]]
    connection.sendall(b"1")
    connection.close()


def main() -> None:
    """Serve, or run Flower's command line once."""
    program, *words = sys.argv[1:]
    if words[:1] == ["--serve"]:
        serve(program, Path(words[1]), int(words[2]))
    else:
        sys.argv[:2] = [program]
        load(program)()


if __name__ == "__main__":
    main()
