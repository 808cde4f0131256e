"""`mh-pfedhn status`: what a participant, or the operator of a run, wants to know meanwhile."""

from __future__ import annotations

import argparse
import html
import io
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.errors import DataError
from common.files import printable, read_json, replace_file
from experiments.console import make_console, say
from experiments.deploy.attendance import drawn_run, run_status
from experiments.deploy.supervise import TROUBLE, worth

LOCK, MODELS = "join.lock", "models"
SHOWN = 12
"""Rounds of the table, the newest."""
PAUSE_S = 2.0
PAGE_WIDTH = 140
REFRESH = '<meta http-equiv="refresh" content="2">'
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ margin: 2rem; font: 14px ui-monospace, monospace; overflow-x: auto; }}</style>
</head><body>{body}</body></html>
"""


def add_status_parser(commands: Any) -> None:
    """Add `status` to the command line."""
    command = commands.add_parser("status")
    command.add_argument(
        "folder", type=Path, metavar="STATE|RUN", help="a participant's folder, or a run's"
    )
    command.add_argument("--watch", action="store_true", help="go on until Ctrl-C")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument(
        "--html", type=Path, metavar="FILE", help="a page; with --watch it loads itself anew"
    )
    command.set_defaults(command=show_status)


def show_status(args: argparse.Namespace) -> int:
    """Print the status once, or again and again."""
    folder: Path = args.folder
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not there. Name a participant's folder, STATE/CLIENT-ID, or a run's."
        )
    is_run = (folder / "summary.json").exists()
    if not is_run and not (folder / LOCK).exists() and not (folder / MODELS).exists():
        raise DataError(f"{folder} is no participant's folder (STATE/CLIENT-ID), and no run's.")
    read, draw = (run_status, drawn_run) if is_run else (status_of, drawn)
    console = make_console(markup=False)

    def look() -> RenderableType:
        return draw(plain(read(folder)))

    if args.json:
        print(json.dumps(read(folder), indent=2))
    elif args.html:
        write_page(look(), args.html, folder.name, again=args.watch)
        say(console, f"{args.html} shows {folder}{', until Ctrl-C' * args.watch}")
        while args.watch:
            time.sleep(PAUSE_S)
            write_page(look(), args.html, folder.name, again=True)
    elif not args.watch:
        console.print(look())
    else:
        with Live(look(), console=console, refresh_per_second=1) as live:
            while True:
                time.sleep(PAUSE_S)
                live.update(look())
    return 0


def write_page(status: RenderableType, path: Path, title: str, *, again: bool) -> None:
    """Write what the terminal shows as a page, which a browser loads `again` and again."""
    console = Console(
        record=True, width=PAGE_WIDTH, file=io.StringIO(), force_terminal=True, markup=False
    )
    console.print(status)
    body = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    replace_file(path, PAGE.format(title=html.escape(title), refresh=REFRESH * again, body=body))


def plain(value: Any) -> Any:
    """Return what was read from files, which others may have made, without what terminals obey."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def status_of(state: Path) -> dict[str, Any]:
    """Return whether `join` runs, the newest federation, and a row for every model that came."""
    from client_app.notices import PAUSE
    from client_app.shelf import Shelf

    shelf = Shelf(state)
    known = shelf.federations()
    rows = shelf.history(known[-1]) if known else []
    pause, ended = read_json(state / PAUSE), bool(rows and rows[-1].get("run_ended"))
    elsewhere = known and pause.get("federation") != known[-1]
    return {
        "client": state.name,
        "joined": is_held(state / LOCK),
        "trouble": read_json(state / TROUBLE),
        "federation": known[-1] if known else None,
        "run_ended": ended,
        "pause": None if not pause or elsewhere or (ended and pause["continued"]) else pause,
        "rounds": rows,
        "seconds_since": _age(rows[-1]["time"]) if rows else None,
    }


def drawn(status: dict[str, Any]) -> RenderableType:
    """Draw a status: a line, a table of the newest rounds, what joining is worth."""
    joined = Text("joined", "green") if status["joined"] else Text("not joined", "red")
    head = Text.assemble((status["client"], "bold"), "  ", joined)
    if trouble := status["trouble"]:
        head.append(f"  {trouble['reason']} ({trouble['time']})", "yellow")
    pause = status["pause"]
    if pause and pause["continued"]:
        head.append(f"  continued at round {pause['round']}")
    elif pause:
        word = "paused" if pause["told"] else "stopped"
        head.append(f"  {word} after round {pause['round']} since {pause['time']}", "yellow")
    if not (rows := status["rounds"]):
        return Group(head, Text("no model has come yet: there is one after the first round"))
    head.append(f"  federation {status['federation']}, ")
    head.append(f"newest model {status['seconds_since']:.0f} s ago")
    if status["run_ended"] and not pause:
        head.append("  the run has ended", "bold")
    names = [k for k in rows[-1] if k.startswith("accuracy_")]
    table = Table(
        "round", "validation", "test", *(n.removeprefix("accuracy_") for n in names), "gain"
    )
    newest = {row["round"]: row for row in rows}  # a model is tested before a round, and after
    for row in list(newest.values())[-SHOWN:]:
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
    if path.is_symlink() or not path.is_file():
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
