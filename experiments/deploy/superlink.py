"""`mh-pfedhn superlink`: Flower's SuperLink, with a guard before it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from base64 import b64decode, b64encode
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import printable

LONGEST = 400
"""Of a line of the log, and of each part of it."""
PRAGMAS = (("busy_timeout", "30000"), ("journal_size_limit", str(2**26)))
"""Of SQLite: one waits for another's turn and does not fail; what was large does not stay so."""
KNOWN = "/known"
WITH_BODY = ("/v1/fleet/push-object", "/v1/fleet/push-messages")


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


async def at_the_door(request: Any, call_next: Any, *, translated: Any) -> Any:
    """Ask who it is before a large body is read; say 503 where the database is busy.

    Flower reads bodies first, and says 500 there, after which its callers give up. The gateway asks
    whether a key is known at `KNOWN`, before it takes anything.
    """
    from fastapi import HTTPException
    from sqlalchemy.exc import OperationalError, TimeoutError
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    from experiments.deploy.guard import BusyError

    async def inside(request: Any) -> Any:
        try:
            if request.url.path in (KNOWN, *WITH_BODY):
                await run_in_threadpool(require_known, request)
            if request.url.path == KNOWN:
                return Response(status_code=204)
            return await call_next(request)
        except (OperationalError, TimeoutError, BusyError) as error:
            raise HTTPException(503, "busy: try again") from error

    return await translated(request, inside)


def require_known(request: Any) -> None:
    """Raise HTTPException where a request is not signed with the key of a known node.

    Flower holds time and node against it once the body is there.
    """
    from fastapi import HTTPException
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
    from flwr.superlink.dependencies.linkstate import get_linkstate

    try:
        headers = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
        key, signature = (b64decode(request.headers[name], validate=True) for name in headers)
        if request.headers.getlist(headers[0]) != [b64encode(key).decode()]:
            raise ValueError("a key has one spelling, by which the gateway counts its requests")
        signed = request.headers[TIMESTAMP_HEADER].encode("ascii")
        known = get_linkstate(request).get_node_id_by_public_key(key) is not None
        if known and verify_signature(bytes_to_public_key(key), signed, signature):
            return
    except (KeyError, ValueError, TypeError):
        pass
    raise HTTPException(401, "Invalid SuperNode authentication")


def beside_database(words: Sequence[str]) -> Path | None:
    """Return the folder of the database of `flower-superlink`, None where it is in none.

    There is room for replies on their way; where temporary files are may be memory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--database", type=Path, default=Path())
    folder: Path = parser.parse_known_args(words)[0].database.parent
    return folder.resolve() if folder.is_dir() else None


def of_participants(record: logging.LogRecord) -> bool:
    """Leave out the lines about what anybody may ask: strangers would push all others out."""
    return not any(path in record.getMessage() for path in (" /known ", " /health "))


def run_superlink(args: argparse.Namespace) -> int:
    """Run `flower-superlink` with these words; returns when it ends."""
    from flwr.supercore import sql_mixin
    from flwr.superlink import main
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers

    wants_help = {"-h", "--help"} & {*args.words}
    if not wants_help and not any(word.partition("=")[0] == "--database" for word in args.words):
        raise ConfigError("superlink: give --database FILE; messages are kept, and checked, there.")
    from experiments.deploy.guard import Guard

    os.umask(0o077)  # what participants send lies in the database
    vars(sql_mixin)["SQLITE_PRAGMAS"] = (*vars(sql_mixin)["SQLITE_PRAGMAS"], *PRAGMAS)
    translated = vars(main)["http_error_translator"]
    vars(main)["http_error_translator"] = partial(at_the_door, translated=translated)
    Guard(fleet_handlers, runtime_handlers, beside_database(args.words)).install()
    for name in ("flwr", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).addFilter(on_a_line)
    logging.getLogger("uvicorn.access").addFilter(of_participants)
    sys.argv = ["flower-superlink", *args.words]
    flower_superlink()
    return 0
