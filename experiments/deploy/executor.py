"""Flower's SuperExec, which starts a process for each task without telling the machine its token.

Flower writes it on the command line, where every user of the machine reads it; with it they could
answer in the task's place.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


def start_task(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a task's process as subprocess.Popen, its token on standard input."""
    words = list(command)
    at = words.index("--token")
    token = words[at + 1]
    words[at : at + 2] = ["--token-stdin"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    try:
        process.stdin.write(f"{token}\n".encode())
        process.stdin.close()
    except BrokenPipeError:  # it has ended already; its own output says why
        pass
    return process


def main() -> None:
    """Run `flower-superexec` with the words of this command line."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    shim = SimpleNamespace(Popen=start_task, DEVNULL=subprocess.DEVNULL)
    vars(subprocess_executor)["subprocess"] = shim
    flower_superexec()


if __name__ == "__main__":
    main()
