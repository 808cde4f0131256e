"""The message's side: forward it to the worker, wait for the answer, recover from a lost worker."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from client_app.worker.frames import Frame, decode, encode, receive, send
from client_app.worker.place import CODE_ROOT, Place, WorkerOrder, WorkerUnavailableError
from common import errors
from common.errors import MHpFedHNError, WireError
from common.log import logger

WORKER_FOLDER = "worker"
ATTEMPTS = 2
"""Workers that one message may lose: after that it is handled in process."""
MAX_TURNS = 6
"""With the replacements of workers that serve another run; two runs at once take turns."""


class WorkerReplacedError(MHpFedHNError):
    """The worker serves other code or settings and has retired."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"worker {pid} was replaced")
        self.pid = pid


@dataclass(frozen=True)
class Patience:
    """How long to wait: for any sign of life (ticks come every 2 s), and idle before it ends."""

    silence_s: float = 120.0
    idle_s: float = 600.0


@dataclass(frozen=True)
class Link:
    """The way from one participant's message to its worker."""

    place: Place
    context: Context
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def open(cls, context: Context, state_folder: Path, patience: Patience) -> Link:
        """Open the way to the worker that lives in a participant's state folder.

        Raises
        ------
        WorkerUnavailableError
            This machine or folder cannot host one.
        """
        return cls(Place.open(state_folder / WORKER_FOLDER), context, patience)

    def ask(self, message_type: str, content: RecordDict) -> RecordDict:
        """Let the worker answer a message.

        Raises
        ------
        WorkerUnavailableError
            No worker answers; the message can be handled in process.
        Exception
            What the handler raised in the worker: same class where it is one of this project or of
            Python's, same text always.
        """
        request = self._request(message_type, content)
        answer, losses = None, 0
        for _ in range(MAX_TURNS):
            try:
                answer = self._exchange(request)
            except WorkerReplacedError as error:
                self.place.retire(error.pid, kill=False)
            except WireError as error:
                raise WorkerUnavailableError(str(error)) from error
            except OSError as error:
                losses += 1
                self._recover(error, last=losses == ATTEMPTS)
            if answer is not None or losses == ATTEMPTS:
                break
        if answer is None:
            raise WorkerUnavailableError(f"{losses} workers lost over one message")
        if not answer.header["ok"]:
            raise rebuilt_error(answer.header)
        return decode(answer.body)

    def _exchange(self, request: Frame) -> Frame:
        order = WorkerOrder(request.header["identity"], self.patience.idle_s, os.getppid())
        with self.place.connect(order) as connection:
            connection.settimeout(self.patience.silence_s)
            try:
                send(connection, request)
            except (BrokenPipeError, ConnectionResetError) as error:
                answer = _last_words(connection)
                if answer is None:
                    raise error
            else:
                answer = receive(connection)
            while answer.header.get("kind") == "tick":
                answer = receive(connection)
        if answer.header.get("kind") == "replaced":
            raise WorkerReplacedError(int(answer.header["pid"]))
        return answer

    def _recover(self, error: OSError, *, last: bool) -> None:
        """Get rid of a worker that broke the connection or fell silent."""
        why = "gave no sign of life" if isinstance(error, TimeoutError) else f"was lost ({error})"
        then = "handling the message in process" if last else "starting another"
        logger.warning("The warm worker in %s %s; %s.", self.place.folder, why, then)
        pid = self.place.running()
        if pid is not None:
            self.place.retire(pid, kill=True)

    def _request(self, message_type: str, content: RecordDict) -> Frame:
        context = self.context
        facts = {
            "run_id": context.run_id,
            "node_id": context.node_id,
            "node_config": dict(context.node_config),
            "run_config": dict(context.run_config),
        }
        header = {"kind": "message", "message_type": message_type, "identity": identity(facts)}
        return Frame(header | facts, encode(content))


def _last_words(connection: socket.socket) -> Frame | None:
    """Read what the worker said before it hung up on a request it would not read."""
    try:
        return receive(connection)
    except (OSError, WireError):
        return None


def identity(facts: Mapping[str, Any]) -> str:
    """Name everything that a worker's answers depend on; another name needs another worker.

    The app's folder holds the hash of its FAB. The run is part of it, so that each run sees the
    participant's code and data as they are when it starts.
    """
    key = [str(CODE_ROOT), sys.executable, sys.version, sorted(sys.path), facts]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def rebuilt_error(header: Mapping[str, Any]) -> Exception:
    """Make the worker's exception again; the worker's traceback is attached as a note."""
    name, text = str(header["error"]), str(header["text"])
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    error: Exception = MHpFedHNError(f"{name}: {text}")
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            again = kind(text)
        except TypeError:  # a class that wants other arguments
            again = error
        error = again if str(again) == text else error
    error.add_note(f"raised in the warm worker:\n{header['traceback']}")
    return error
