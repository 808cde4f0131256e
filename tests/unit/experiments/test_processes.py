from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from common.errors import RunError
from experiments.run.engines import processes
from tests.support.deployment import wait_until

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
# Its child starts a session of its own, as Flower does, and ignores SIGTERM.
PARENT = """
import subprocess, sys, time
child = "import signal as s, time; s.signal(15, s.SIG_IGN); print('up', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(60)
"""


def start(code: str, mark: str, folder: Path) -> processes.Process:
    env = {**os.environ, processes.MARK: mark}
    command = [sys.executable, "-c", code]
    process = processes.start(command, env=env, log=folder / "log", cwd=folder)
    wait_until(lambda: "up" in (folder / "log").read_text(), 20, "the process is up")
    return process


@pytest.mark.parametrize("orphaned", [False, True])
def test_marked_processes_are_stopped_even_when_detached_and_stubborn(
    tmp_path: Path, orphaned: bool
) -> None:
    mark = str(tmp_path)
    parent = start(PARENT, mark, tmp_path)
    seen = psutil.Process(parent.pid)
    (child,) = seen.children()
    if orphaned:
        parent.kill()
        parent.wait(5)
        assert processes.is_alive(child)
    assert processes.stop_marked(mark, patience_s=0.5) == (1 if orphaned else 2)
    parent.wait(5)
    assert not processes.is_alive(seen)
    assert not processes.is_alive(child)


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    other = start(SLEEPER, "another run", tmp_path)
    try:
        assert processes.stop_marked(str(tmp_path)) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait(5)


def test_missing_program_is_explained() -> None:
    with pytest.raises(RunError, match=r"no-such-flwr is not installed: `pip install"):
        processes.find_program("no-such-flwr")


def test_superlink_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "print('port is taken'); raise SystemExit(3)"]
    process = processes.start(command, env=dict(os.environ), log=log, cwd=tmp_path)
    with pytest.raises(RunError, match=r"SuperLink ended at its start.*\nport is taken"):
        processes.wait_until_healthy(process, port=processes.free_port(), timeout_s=20, log=log)
