"""`mh-pfedhn join`: check everything a participant brings, then run and supervise its SuperNode."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from common.errors import ConfigError, RunError
from common.files import PRIVATE, closed_folder
from experiments.console import add_set_option, make_console, say
from experiments.deploy.settings import FLAGS, read_settings

CHECKS_FAILED = 1


def add_join_parser(commands: Any) -> None:
    """Add `join` to the command line."""
    command = commands.add_parser("join")
    command.add_argument("file", nargs="?", metavar="FILE.toml", help="everything below, as a file")
    for flag, (metavar, purpose) in FLAGS.items():
        command.add_argument(f"--{flag}", metavar=metavar, help=purpose)
    command.add_argument("--insecure", action="store_true", default=None, help="no TLS: tests only")
    command.add_argument("--check", action="store_true", help="only check, start nothing")
    add_set_option(command, "any other key of the node config")
    command.set_defaults(command=run_join)


def run_join(args: argparse.Namespace) -> int:
    """Check, then take part until stopped.

    Returns 0 when all is done, 1 when a check failed or the SuperNode cannot run.
    """
    from experiments.deploy.checks import run_checks
    from experiments.deploy.supervise import Supervisor

    console = make_console()
    settings = read_settings(args)
    if str(settings.base) not in sys.path:
        sys.path.append(str(settings.base))
    with _hold(settings.folder):
        if not run_checks(settings, console, must_answer=args.check):
            say(console, "not joined", style="bold red", end=": ")
            say(console, "correct what failed above, then run it again")
            return CHECKS_FAILED
        if args.check:
            say(console, "ready", style="bold green", end=": ")
            say(console, "without --check this participant joins")
            return 0
        say(
            console,
            f"joining {settings.server} as {settings.client_id}; everything of this participant is "
            f"in {settings.folder}; Ctrl-C leaves",
        )
        return Supervisor(settings, console).run()


def _hold(folder: Path) -> AcquireReturnProxy:
    """Make the participant's folder and lock it: the server would refuse two nodes of one name."""
    try:
        closed_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"join: {folder} cannot be made: {error.strerror}. Choose another --state-dir."
        ) from error
    try:
        return FileLock(folder / "join.lock", mode=PRIVATE).acquire(
            timeout=2
        )  # `status` looks at it
    except Timeout as error:
        raise RunError(
            f"another `mh-pfedhn join` already runs with {folder}. Stop it, or choose another "
            "client-id."
        ) from error
