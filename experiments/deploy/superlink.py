"""`mh-pfedhn superlink`: Flower's SuperLink, with a guard before it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import printable

LONGEST = 2000
"""Of a line of the log."""


def add_superlink_parser(commands: Any) -> None:
    """Add `superlink` to the command line; its words are those of `flower-superlink`."""
    command = commands.add_parser(
        "superlink", add_help=False,
        prefix_chars="\0",
    )  # fmt: skip
    command.add_argument("words", nargs="*")
    command.set_defaults(command=run_superlink)


def on_a_line(record: logging.LogRecord) -> bool:
    """Write what others sent on a line, without what a terminal would obey."""
    record.msg = printable(str(record.msg))[:LONGEST]
    if isinstance(record.args, tuple):
        record.args = tuple(
            x if isinstance(x, (int, float)) else printable(str(x))[:LONGEST] for x in record.args
        )
    return True


def beside_database(words: Sequence[str]) -> Path | None:
    """Return the folder of the database of `flower-superlink`, None where it is in none.

    There is room for replies on their way; where temporary files are may be memory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--database", type=Path, default=Path())
    folder: Path = parser.parse_known_args(words)[0].database.parent
    return folder.resolve() if folder.is_dir() else None


def run_superlink(args: argparse.Namespace) -> int:
    """Run `flower-superlink` with these words; returns when it ends."""
    from flwr.supercore import sql_mixin
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers

    wants_help = {"-h", "--help"} & {*args.words}
    if not wants_help and not any(word.partition("=")[0] == "--database" for word in args.words):
        raise ConfigError("superlink: give --database FILE; messages are kept, and checked, there.")
    from experiments.deploy.guard import Guard

    # one waits for another's turn at the database, and does not fail
    waiting = (*vars(sql_mixin)["SQLITE_PRAGMAS"], ("busy_timeout", "30000"))
    vars(sql_mixin)["SQLITE_PRAGMAS"] = waiting
    Guard(fleet_handlers, runtime_handlers, beside_database(args.words)).install()
    for name in ("flwr", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).addFilter(on_a_line)
    sys.argv = ["flower-superlink", *args.words]
    flower_superlink()
    return 0
