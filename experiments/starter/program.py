"""Install the program that starts messages, and own the process that forks for them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from experiments.starter.message import CLIENT

HERE = Path(__file__).resolve().parent


def install_program(folder: Path, name: str = CLIENT) -> Path:
    """Write Flower's program `name` into folder/bin, a private folder, and return that."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    programs.chmod(0o700)
    command = shlex.join([sys.executable, "-I", "-S", str(HERE / "ask.py"), str(programs), name])
    draft = programs / f".{name}"
    draft.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    draft.chmod(0o755)
    os.replace(draft, programs / name)
    return programs


class Starter:
    """A context in which messages are forked; leaving it ends the messages that still run.

    Parameters
    ----------
    folder
        The participant's folder, in which the program is installed.
    environment
        That of its SuperNode. The starter imports Flower in it; a message brings its own.
    name
        The program: `flwr-clientapp`, or `flwr-serverapp` on the server's side.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], name: str = CLIENT) -> None:
        self._folder = folder
        self._name = name
        self._environment = dict(environment)

    def __enter__(self) -> Self:
        programs = install_program(self._folder, self._name)
        command = [sys.executable, "-P", str(HERE / "message.py"), self._name]
        with (self._folder / "starter.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--serve", str(programs), str(os.getpid())],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """The process that forks."""
        return self._process.pid

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
