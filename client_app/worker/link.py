"""The message's side: find or start the worker, forward the message, recover from a lost worker."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Self

import psutil
from filelock import FileLock

from client_app.worker import MAX_LOG_BYTES, RECORD, WORKING, remove_socket
from common import errors
from common.errors import MHpFedHNError
from common.files import PRIVATE, private_folder
from common.log import logger

LOCK, LOG = "worker.lock", "worker.log"
ATTEMPTS = 2
"""Workers that one message may lose: after that it is handled in process."""
CODE_ROOT = Path(__file__).resolve().parents[2]


class WorkerUnavailableError(MHpFedHNError):
    """The message has to be handled in this process; the text says why."""


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker writes into its folder: how to reach it, what it serves, which process it is.

    `created` (seconds since the epoch) tells the process from a later one of the same pid.
    """

    address: str
    key: str
    identity: str
    pid: int
    created: float

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the record of the worker that runs in a folder; None when there is none."""
        try:
            record = cls(**json.loads((folder / RECORD).read_text()))
            return record if record.is_alive() else None
        except (OSError, ValueError, TypeError):
            return None

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1.0  # two readings of the clock
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        return False

    def kill(self) -> None:
        """End the process; whoever waits for a word of it gets an error."""
        if self.is_alive():
            with suppress(psutil.Error):
                process = psutil.Process(self.pid)
                process.kill()
                process.wait(timeout=10)
        remove_socket(self.address)


@dataclass(frozen=True)
class Link:
    """The way from one participant's messages to its worker.

    The worker's `folder` is made private to this user. `function`, "module:function", replies in
    it: (facts, body) -> body of the reply. Another `context` (JSON-able) needs another worker. It
    ends after `idle_s` seconds without a message, and is killed after `silence_s` without a sign
    of life.
    """

    folder: Path
    function: str
    context: Mapping[str, Any]
    idle_s: float = 600.0
    silence_s: float = 120.0

    def ask(self, message_type: str, body: bytes) -> bytes:
        """Let the worker reply to a message.

        Raises WorkerUnavailableError where no worker replies and the message is to be handled in
        process, and what the function raised in the worker (of another error, name and text).
        """
        facts = json.dumps({**self.context, "message_type": message_type}).encode()
        _make_private(self.folder)
        for attempts_left in reversed(range(ATTEMPTS)):
            worker = None
            try:
                worker = self._worker()
                return self._exchange(worker, facts, body)
            except (OSError, EOFError, AuthenticationError) as error:
                if worker is not None:
                    worker.kill()
                logger.warning(
                    "The warm worker in %s was lost, or silent for %.0f s (%r); %s.",
                    self.folder,
                    self.silence_s,
                    error,
                    "starting another" if attempts_left else "handling the message in process",
                )
        raise WorkerUnavailableError(f"{ATTEMPTS} workers were lost over one message")

    def _exchange(self, worker: WorkerRecord, facts: bytes, body: bytes) -> bytes:
        with self._kills_if_silent(worker):
            connection = Client(worker.address, authkey=bytes.fromhex(worker.key))
        with connection:
            with self._kills_if_silent(worker):
                connection.send_bytes(facts)
                connection.send_bytes(body)
            head = WORKING
            while head == WORKING:
                with self._kills_if_silent(worker):
                    head = connection.recv_bytes()
            if failure := json.loads(head):
                raise _rebuilt_error(failure)
            return connection.recv_bytes()

    @contextmanager
    def _kills_if_silent(self, worker: WorkerRecord) -> Iterator[None]:
        """Kill the worker when the block takes longer than `silence_s`; the block then fails."""
        timer = threading.Timer(self.silence_s, worker.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _worker(self) -> WorkerRecord:
        """Return the worker that serves this context; start one where there is none."""
        identity = self._identity()
        with FileLock(self.folder / LOCK, mode=PRIVATE):
            worker = WorkerRecord.read(self.folder)
            if worker is None or worker.identity != identity:
                self._start(identity)
                worker = WorkerRecord.read(self.folder)
        if worker is None:
            raise WorkerUnavailableError(f"no worker starts; {self.folder / LOG} says why")
        return worker

    def _start(self, identity: str) -> None:
        """Start a worker and wait until it can be reached, or has ended."""
        command = [sys.executable, "-P", "-m", "client_app.worker.process", str(self.folder)]
        command += [identity, self.function, str(self.idle_s), str(os.getppid())]
        path = os.pathsep.join([str(CODE_ROOT), *(p for p in sys.path if p)])
        log = self.folder / LOG
        mode = "ab" if log.exists() and log.stat().st_size < MAX_LOG_BYTES else "wb"
        with log.open(mode) as output:
            log.chmod(PRIVATE)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        process.returncode = 0  # it outlives this process: nobody here waits for its end
        if process.stdout is not None:
            with process.stdout as ready:
                ready.read()  # a worker closes its output when it listens

    def _identity(self) -> str:
        """Name the code and the context.

        The app's folder holds the hash of its FAB, and the context the run: each run sees the
        participant's code and data as they are when it starts.
        """
        key = [str(CODE_ROOT), sys.executable, sys.version, sorted(sys.path), self.function]
        return hashlib.sha256(json.dumps([key, self.context], sort_keys=True).encode()).hexdigest()


def _make_private(folder: Path) -> None:
    """Create a folder, or check that it is this user's; close it to others."""
    try:
        private_folder(folder)
        facts = folder.lstat()
        own = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
        if not stat.S_ISDIR(facts.st_mode) or not own:
            raise WorkerUnavailableError(f"{folder} is not a folder of this user")
        folder.chmod(0o700)
    except OSError as error:
        raise WorkerUnavailableError(f"{folder} cannot be prepared: {error}") from error


def _rebuilt_error(failure: Mapping[str, str]) -> MHpFedHNError:
    """Make the worker's error again, with the worker's traceback as a note."""
    kind = getattr(errors, failure["error"], None)
    if isinstance(kind, type) and issubclass(kind, MHpFedHNError):
        error = kind(failure["text"])
    else:
        error = MHpFedHNError(f"{failure['error']}: {failure['text']}")
    error.add_note(f"raised in the warm worker:\n{failure['traceback']}")
    return error
