"""The worker: `python -m client_app.worker.process`, started by `link`.

One thread computes (models belong to a thread, and a participant trains one message at a time); one
accepts; one for each connection reads the request, says every second that it is being worked on,
and then replies. The process ends when nothing came for a while, when the process it belongs to is
gone, when its folder names another worker, and after an error nobody planned for (a GPU, for one,
may be unusable after it): the next message gets a fresh worker.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, NoReturn

import psutil

from client_app.worker import MAX_LOG_BYTES, RECORD, WORKING, remove_socket
from common.errors import MHpFedHNError
from common.files import PRIVATE, replace_file

SIGN_OF_LIFE_S = 1.0
POLL_S = 1.0


class Worker:
    """Serves the requests that come to a listener by one function, "module:function"."""

    def __init__(self, listener: Listener, function: str) -> None:
        self._listener = listener
        self._function = function
        self._computing = ThreadPoolExecutor(max_workers=1)
        self._lock = threading.Lock()
        self._open = 0
        self._last_used = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last connection ended; 0 while somebody waits for a reply."""
        return 0.0 if self._open else time.monotonic() - self._last_used

    def accept(self) -> None:
        """Serve whoever connects and knows the key; never returns."""
        while True:
            with suppress(OSError, EOFError, AuthenticationError):
                connection = self._listener.accept()
                self._count(1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _count(self, change: int) -> None:
        with self._lock:
            self._open += change
            self._last_used = time.monotonic()

    def _serve(self, connection: Connection) -> None:
        try:
            with connection:
                self._answer(connection)
        except (OSError, EOFError) as error:
            print(f"the message's process is gone: {error!r}", file=sys.stderr)
        finally:
            self._count(-1)

    def _answer(self, connection: Connection) -> None:
        facts = json.loads(connection.recv_bytes())
        future = self._computing.submit(self._call, facts, connection.recv_bytes())
        try:
            while not wait([future], SIGN_OF_LIFE_S).done:
                connection.send_bytes(WORKING)
        finally:
            future.cancel()  # work that nobody waits for is not begun
        _keep_short(sys.stderr.fileno())
        error = future.exception()
        if error is None:
            connection.send_bytes(b"{}")
            connection.send_bytes(future.result())
            return
        traceback.print_exception(error)
        trace = "".join(traceback.format_exception(error))[-20_000:]
        failure = {"error": type(error).__name__, "text": str(error), "traceback": trace}
        connection.send_bytes(json.dumps(failure).encode())
        if not isinstance(error, MHpFedHNError):
            _end(self._listener)

    def _call(self, facts: dict[str, Any], body: bytes) -> bytes:
        module, _, name = self._function.partition(":")
        reply: bytes = getattr(importlib.import_module(module), name)(facts, body)  # torch: seconds
        return reply


def _keep_short(log: int) -> None:
    """Begin the log anew where it has become long; a server's messages are part of it."""
    if os.fstat(log).st_size > MAX_LOG_BYTES:
        os.ftruncate(log, 0)


def _end(listener: Listener) -> NoReturn:
    """End the process whatever it computes."""
    listener.close()
    remove_socket(str(listener.address))
    os._exit(1)


def _is_named(folder: Path) -> bool:
    """Whether the folder names this process as its worker."""
    try:
        return bool(json.loads((folder / RECORD).read_text())["pid"] == os.getpid())
    except (OSError, ValueError, KeyError):
        return False


def main() -> None:
    """Listen, write the record, close the output to say so, serve until nobody needs it."""
    folder, identity, function, idle_s, owner_pid = sys.argv[1:]
    owner = psutil.Process(int(owner_pid))
    key = secrets.token_bytes(32)
    listener = Listener(authkey=key)
    record = {
        "address": listener.address,
        "key": key.hex(),
        "identity": identity,
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
    }
    replace_file(Path(folder) / RECORD, json.dumps(record), mode=PRIVATE)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(listener, function)
    threading.Thread(target=worker.accept, daemon=True).start()
    while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
        time.sleep(POLL_S)
        if worker.idle_s > (float(idle_s) if _is_named(Path(folder)) else 0.0):
            break
    if not worker.idle_s:
        _end(listener)  # the owner is gone: there is nobody to reply to
    listener.close()


if __name__ == "__main__":
    main()
