"""Own every process a run starts, and leave none behind.

Flower detaches what it launches: the SuperLink's SuperExec is a session of its own, the simulation
starts Ray, and Ray's daemons outlive a parent that was killed. A process tree alone therefore
misses some, and names or ports would hit other people's. Every process of a run inherits one
environment variable whose value no other run has; together with the tree it finds them all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

from common.errors import RunError

MARK = "MH_PFEDHN_RUN_MARK"

Process = subprocess.Popen[bytes]


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_program(name: str) -> str:
    """Return the path of one of Flower's programs, the one beside this Python before others.

    Raises RunError where Flower is not installed here.
    """
    found = shutil.which(name, path=program_path())
    if found is None:
        raise RunError(f"{name} is not installed: `pip install 'flwr==1.42.*'` in this Python.")
    return found


def program_path(base: Mapping[str, str] = os.environ) -> str:
    """Return the PATH of an environment, before it the programs beside this Python."""
    return os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])


def start(command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path) -> Process:
    """Start a process in its own session (Ctrl-C reaches only us), output appended to `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_healthy(process: Process, *, port: int, timeout_s: float, log: Path) -> None:
    """Wait until a SuperLink answers on its health address.

    Raises RunError where it ended, or did not answer in time; the end of its log is quoted.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = monotonic() + timeout_s
    while monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"Flower's SuperLink ended at its start. {quote_end(log)}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            opener.open(f"http://127.0.0.1:{port}/health", timeout=1.0).close()
            return
        sleep(0.1)
    raise RunError(
        f"Flower's SuperLink did not answer on port {port} within {timeout_s:.0f} s. "
        f"{quote_end(log)}"
    )


def quote_end(log: Path, *, lines: int = 15) -> str:
    """Return the last lines of a log for an error message."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    tail = "\n".join(text.strip().splitlines()[-lines:])
    return f"The end of {log}:\n{tail}" if tail else f"{log} is empty."


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, with what is left of that, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows knows no sessions
            process.kill()
    process.wait()


@contextlib.contextmanager
def guarded(mark: str) -> Iterator[None]:
    """Stop all processes that carry `mark` when the context is left, or this process is no more.

    A second process waits for the end of a pipe that this one holds: nothing that kills us, kill -9
    included, leaves what we started behind.
    """
    command = [sys.executable, "-P", "-m", __name__, mark]
    env = {key: value for key, value in os.environ.items() if key != MARK}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    guard = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            guard.communicate(timeout=15.0)


def stop_marked(mark: str, *, patience_s: float = 5.0) -> int:
    """Stop all processes that carry `mark` in their environment, and all their descendants.

    They are asked first (SIGTERM), then killed after `patience_s`. Processes of others are never
    touched: a candidate carries the mark or descends from one that does. Returns how many processes
    were stopped.
    """
    stopped: set[int] = set()
    for _ in range(3):  # again, for what was being started meanwhile
        found = _family(mark)
        if not found:
            break
        stopped |= {process.pid for process in found}
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(found, timeout=patience_s)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=patience_s)
    return len(stopped)


def cpu_seconds(mark: str) -> float:
    """Return the CPU seconds that all living processes that carry `mark` have used together."""
    total = 0.0
    for process in _family(mark):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _family(mark: str) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    own = os.getpid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                for member in (process, *process.children(recursive=True)):
                    found.setdefault(member.pid, member)
    found.pop(own, None)
    return [p for p in found.values() if is_alive(p)]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; one that ended and waits for its parent does not."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


if __name__ == "__main__":  # the guard
    sys.stdin.buffer.read()
    stop_marked(sys.argv[1], patience_s=2.0)
