"""The worker: `python -m client_app.worker.serve`, started by `place`.

One thread computes (models belong to a thread, and a participant trains one message at a time); one
accepts; one for each connection reads the request, sends a tick every 2 s while it waits, and then
the answer. The process ends when nothing came for a while, when the process it belongs to is gone,
when a request comes from another version, and after an exception nobody planned for (a GPU, for
one, may be unusable after it): the next message gets a fresh worker.
"""

from __future__ import annotations

import argparse
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, RecordDict

from client_app.worker.frames import Frame, decode, encode, peer_is_me, receive, send
from client_app.worker.place import start_ticks
from common.errors import MHpFedHNError, WireError

TICK_S = 2.0
READ_TIMEOUT_S = 60.0
ANCHOR_POLL_S = 2.0

Answer = Callable[[str, RecordDict, Context], RecordDict]


@dataclass
class Job:
    """A request, and the answer once there is one."""

    request: Frame
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    answer: Frame | None = None


class Worker:
    """Serves requests from a listening socket until it retires."""

    def __init__(self, listener: socket.socket, identity: str, answer: Answer) -> None:
        self._listener = listener
        self._identity = identity
        self._answer = answer
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._open = 0
        self._lock = threading.Lock()

    def run(self, idle_s: float) -> None:
        """Serve until idle for `idle_s` seconds, or until told to retire."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        while True:
            try:
                job = self._jobs.get(timeout=idle_s)
            except queue.Empty:
                if self._open:
                    continue
                break
            if job is None:
                break
            if not job.abandoned:
                self._compute(job)
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, refuses who comes now
        self._listener.close()
        self._drain()

    def _drain(self) -> None:
        """Let the connections that are open hear their answer, or that there will be none."""
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.answer = _replaced()
                    job.done.set()
        for thread in threading.enumerate():
            if thread.name == "connection":
                thread.join(timeout=READ_TIMEOUT_S)

    def _compute(self, job: Job) -> None:
        header = job.request.header
        try:
            context = Context(
                run_id=int(header["run_id"]),
                node_id=int(header["node_id"]),
                node_config=header["node_config"],
                state=RecordDict(),
                run_config=header["run_config"],
            )
            content = self._answer(header["message_type"], decode(job.request.body), context)
            job.answer = Frame({"kind": "answer", "ok": True}, encode(content))
        except BaseException as error:  # the app's edge; a user's model may raise anything
            traceback.print_exc()
            job.answer = _failure(error)
            if not isinstance(error, MHpFedHNError):
                self._jobs.put(None)
        job.done.set()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed: the worker retires
                return
            with self._lock:
                self._open += 1
            threading.Thread(
                target=self._serve, args=(connection,), name="connection", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        job: Job | None = None
        try:
            with connection:
                connection.settimeout(READ_TIMEOUT_S)
                if not peer_is_me(connection):
                    return
                job = self._read(connection)
                if job is not None:
                    self._wait(connection, job)
        except OSError as error:  # the message's process is gone, and its server with it
            print(f"connection lost: {error}", file=sys.stderr)
        finally:
            if job is not None:
                job.abandoned = True
            with self._lock:
                self._open -= 1

    def _read(self, connection: socket.socket) -> Job | None:
        try:
            request = receive(connection)
        except WireError as error:
            send(connection, _failure(error))
            return None
        if request.header.get("identity") != self._identity:
            send(connection, _replaced())
            self._jobs.put(None)
            return None
        job = Job(request)
        self._jobs.put(job)
        return job

    def _wait(self, connection: socket.socket, job: Job) -> None:
        while not job.done.wait(TICK_S):
            send(connection, Frame({"kind": "tick"}))
        if job.answer is not None:
            send(connection, job.answer)


def _replaced() -> Frame:
    return Frame({"kind": "replaced", "pid": os.getpid()})


def _failure(error: BaseException) -> Frame:
    facts: dict[str, Any] = {"kind": "answer", "ok": False}
    trace = "".join(traceback.format_exception(error))[-20_000:]
    return Frame(
        facts | {"error": type(error).__name__, "text": str(error)[:100_000], "traceback": trace}
    )


def _end_with(pid: int) -> None:
    """End this process at once when process `pid` ends: its messages have nobody to answer to."""
    born = start_ticks(pid)

    def watch() -> None:
        while start_ticks(pid) == born:
            threading.Event().wait(ANCHOR_POLL_S)
        os._exit(0)

    threading.Thread(target=watch, name="anchor", daemon=True).start()


def main() -> None:
    """Serve the socket that the parent process bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--identity", required=True)
    parser.add_argument("--idle", type=float, required=True)
    parser.add_argument("--anchor", type=int, required=True)
    args = parser.parse_args()
    _end_with(args.anchor)
    from client_app.handlers import answer  # imports torch: seconds

    listener = socket.socket(fileno=args.listener)
    listener.set_inheritable(False)  # or a child of the user's code would keep it open
    Worker(listener, args.identity, answer).run(args.idle)


if __name__ == "__main__":
    main()
