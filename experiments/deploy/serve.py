"""`mh-pfedhn serve`: the host of the ServerApp, beside a SuperLink in process isolation.

It is Flower's SuperExec, which finds the programs beside this Python and ends with this process.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from experiments.deploy.supernode import PYTHON
from experiments.run.engines.processes import program_path

STEADY_S = 10.0
"""Who ends sooner could never work: a wrong address, a wrong secret."""
STOP_S = 9.0
"""A container's processes are killed 10 s after the first was asked to end."""


def add_serve_parser(commands: Any) -> None:
    """Add `serve` to the command line."""
    command = commands.add_parser("serve")
    command.add_argument("--superlink", required=True, metavar="HOST:PORT", help="its address")
    command.add_argument("--certificate", metavar="CA.crt", help="the federation's CA certificate")
    command.add_argument("--secret", metavar="FILE", help="the SuperLink's superexec.secret")
    command.add_argument("--insecure", action="store_true", help="no TLS: tests only")
    command.set_defaults(command=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Run until stopped; returns 0 when it was told to end, else what Flower's SuperExec says.

    A SuperExec that has worked ends when the SuperLink stumbles once: another one follows it. A
    ServerApp ends after its SuperExec, tells participants that its run pauses, and is waited for.
    """
    stopped, process = False, _started(args)
    hosted: list[psutil.Process] = []

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        with suppress(psutil.Error):
            hosted.extend(psutil.Process(process.pid).children(recursive=True))
        process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    while True:
        began = time.monotonic()
        code = process.wait()
        if stopped:
            psutil.wait_procs(hosted, timeout=STOP_S)
        if stopped or time.monotonic() - began < STEADY_S:
            return 0 if stopped else code
        print(f"the SuperExec ended with {code}; another one starts", flush=True)
        process = _started(args)
        if stopped:  # the signal came meanwhile, for the one before
            process.terminate()


def _started(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(args), env={**os.environ, "PATH": program_path()})


def _command(args: argparse.Namespace) -> list[str]:
    command = [*PYTHON, "experiments.deploy.executor", "--runtime-api-address", args.superlink]
    command += ["--parent-pid", str(os.getpid())]  # it ends with us even when we are killed
    command += ["--insecure"] if args.insecure else []
    command += ["--root-certificates", args.certificate] if args.certificate else []
    command += ["--superexec-auth-secret-file", args.secret] if args.secret else []
    return command
