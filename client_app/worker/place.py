"""Where a participant's worker lives: a private folder with its socket, lock, pid and log.

The socket is reached through the folder's descriptor (`/proc/self/fd/N/worker.sock`), so that a
state folder with a long path still fits the 108 bytes of a Unix socket's address. Whoever starts a
worker binds the socket and hands it over listening: connecting works at once, while the worker is
still importing torch, and the socket of a dead worker refuses at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from client_app.worker.frames import peer_is_me
from common.errors import MHpFedHNError
from common.files import PRIVATE, replace_file

SOCKET, LOCK, RECORD, LOG = "worker.sock", "worker.lock", "worker.json", "worker.log"
MAX_LOG_BYTES = 1 << 20
CODE_ROOT = Path(__file__).resolve().parents[2]

_children: list[subprocess.Popen[bytes]] = []
"""Workers that this process started; where it outlives them (tests) it must collect them."""


class WorkerUnavailableError(MHpFedHNError):
    """The message has to be handled in this process; the text says why."""


@dataclass(frozen=True)
class WorkerOrder:
    """What a worker is started for: whose code and settings, how patient, alive with whom."""

    identity: str
    idle_s: float
    anchor_pid: int


@dataclass(frozen=True)
class Place:
    """A worker's folder, private to this user."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Place:
        """Create the folder (0700), or check that it is this user's and close it to others.

        Raises
        ------
        WorkerUnavailableError
            The folder cannot be made, or belongs to somebody else.
        """
        if sys.platform != "linux":
            raise WorkerUnavailableError("the warm worker needs Linux (SO_PEERCRED, /proc)")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            facts = folder.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
                raise WorkerUnavailableError(f"{folder} is not a folder of this user")
            if stat.S_IMODE(facts.st_mode) != 0o700:
                folder.chmod(0o700)
        except OSError as error:
            raise WorkerUnavailableError(f"{folder} cannot be prepared: {error}") from error
        return cls(folder)

    def connect(self, order: WorkerOrder) -> socket.socket:
        """Connect to the worker; start one when there is none.

        Raises
        ------
        WorkerUnavailableError
            No worker can be started here.
        """
        try:
            connection = self._try_connect()
            if connection is None:
                with self._lock():
                    connection = self._try_connect() or self._start(order)
        except OSError as error:
            raise WorkerUnavailableError(f"no worker in {self.folder}: {error}") from error
        if not peer_is_me(connection):
            connection.close()
            raise WorkerUnavailableError(f"{self.folder / SOCKET} is served by another user")
        return connection

    def retire(self, pid: int, *, kill: bool) -> None:
        """Give up process `pid`, unless another worker has taken its place: remove its socket.

        Left alive it finishes what it does and ends; the next `connect` starts another.
        """
        with self._lock():
            if self.running() != pid:
                return
            (self.folder / SOCKET).unlink(missing_ok=True)
            if kill:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def running(self) -> int | None:
        """Return the pid of the worker last started here if that very process is alive."""
        try:
            record = json.loads((self.folder / RECORD).read_text())
            alive = start_ticks(record["pid"]) == record["start_ticks"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return int(record["pid"]) if alive else None

    def _try_connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._address() as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError:
            connection.close()
            raise
        return connection

    def _start(self, order: WorkerOrder) -> socket.socket:
        (self.folder / SOCKET).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            with self._address() as address:
                listener.bind(address)
            os.chmod(self.folder / SOCKET, 0o600)
            listener.listen(16)
            process = self._spawn(order, listener.fileno())
            record = {"pid": process.pid, "start_ticks": start_ticks(process.pid)}
            replace_file(self.folder / RECORD, json.dumps(record), mode=PRIVATE)
            connection = self._try_connect()
        if connection is None:
            raise ConnectionRefusedError("a socket that was just bound refuses connections")
        return connection

    def _spawn(self, order: WorkerOrder, listener_fd: int) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-P", "-m", "client_app.worker.serve"),
            *("--listener", str(listener_fd), "--identity", order.identity),
            *("--idle", str(order.idle_s), "--anchor", str(order.anchor_pid)),
        ]
        path = os.pathsep.join([str(CODE_ROOT), *(p for p in sys.path if p)])
        log = self.folder / LOG
        mode = "ab" if log.exists() and log.stat().st_size < MAX_LOG_BYTES else "wb"
        with log.open(mode) as output:
            log.chmod(0o600)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=(listener_fd,),
                start_new_session=True,
            )
        _children[:] = [child for child in _children if child.poll() is None] + [process]
        return process

    @contextmanager
    def _address(self) -> Iterator[str]:
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{folder}/{SOCKET}"
        finally:
            os.close(folder)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it is dead or a zombie.

    Together with the pid this names a process: pids are used again.
    """
    try:
        # the second field, the command, may hold spaces and brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
