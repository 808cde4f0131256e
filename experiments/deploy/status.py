"""`mh-pfedhn status`: what a participant would like to know while it takes part."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.errors import DataError
from experiments.console import make_console
from experiments.deploy.supervise import worth

LOCK = "join.lock"
SHOWN = 12
"""Rounds of the table, the newest."""
PAUSE_S = 2.0


def add_status_parser(commands: Any) -> None:
    """Add `status` to the command line."""
    command = commands.add_parser("status", help="a participant: connected, rounds, what it gains")
    command.add_argument("state", type=Path, metavar="STATE", help="the participant's folder")
    command.add_argument("--watch", action="store_true", help="go on until Ctrl-C")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(command=show_status)


def show_status(args: argparse.Namespace) -> int:
    """Print the status once, or again and again."""
    if not args.state.is_dir():
        raise DataError(f"{args.state} is not there. Name a participant's folder: STATE/CLIENT-ID.")
    if args.json:
        print(json.dumps(status_of(args.state), indent=2))
        return 0
    console = make_console()
    if not args.watch:
        console.print(drawn(status_of(args.state)))
        return 0
    with Live(drawn(status_of(args.state)), console=console, refresh_per_second=1) as live:
        while True:
            time.sleep(PAUSE_S)
            live.update(drawn(status_of(args.state)))


def status_of(state: Path) -> dict[str, Any]:
    """Return whether `join` runs, the newest federation, and a row for every model that came."""
    from client_app.shelf import Shelf

    shelf = Shelf(state)
    known = shelf.federations()
    rows = shelf.history(known[-1]) if known else []
    return {
        "client": state.name,
        "joined": is_held(state / LOCK),
        "federation": known[-1] if known else None,
        "rounds": rows,
        "seconds_since": _age(rows[-1]["time"]) if rows else None,
    }


def drawn(status: dict[str, Any]) -> RenderableType:
    """Draw a status: a line, a table of the newest rounds, what joining is worth."""
    joined = Text("joined", "green") if status["joined"] else Text("not joined", "red")
    head = Text.assemble((status["client"], "bold"), "  ", joined)
    if not (rows := status["rounds"]):
        return Group(head, Text("no model has come yet: there is one after the first round"))
    head.append(f"  federation {status['federation']}, ")
    head.append(f"newest model {status['seconds_since']:.0f} s ago")
    names = [k for k in rows[-1] if k.startswith("accuracy_")]
    table = Table(
        "round", "validation", "test", *(n.removeprefix("accuracy_") for n in names), "gain"
    )
    for row in rows[-SHOWN:]:
        keys = ["validation_accuracy", "test_accuracy", *names]
        cells = ["" if row.get(k) is None else f"{row[k]:.3f}" for k in keys]
        gain = f"{100 * row['gain']:+.1f}" if "gain" in row else ""
        table.add_row(str(row["round"]), *cells, gain)
    lines: list[RenderableType] = [head, table, Text(worth(rows[-1]))]
    if rows[-1].get("epsilon") is not None:
        lines.append(Text(f"epsilon spent {rows[-1]['epsilon']:.2f}"))
    return Group(*lines)


def is_held(path: Path) -> bool:
    """Whether a process holds a lock; nothing is made."""
    if not path.exists():
        return False
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _age(stamp: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
