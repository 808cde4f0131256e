"""Flower's SuperExec, which starts a process for each task without telling the machine its token.

Flower writes it on the command line, where every user of the machine reads it; with it they could
answer in the task's place.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


def start_task(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a task's process as subprocess.Popen; its token is in a file without a name."""
    words = list(command)
    at = words.index("--token")
    with tempfile.TemporaryFile() as file:
        file.write(words[at + 1].encode())
        file.flush()
        file.seek(0)
        words[at : at + 2] = ["--token-file", f"/dev/fd/{file.fileno()}"]
        return subprocess.Popen(words, pass_fds=(file.fileno(),), **options)


def main() -> None:
    """Run `flower-superexec` with the words of this command line."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    shim = SimpleNamespace(Popen=start_task, DEVNULL=subprocess.DEVNULL)
    vars(subprocess_executor)["subprocess"] = shim
    flower_superexec()


if __name__ == "__main__":
    main()
