"""`mh-pfedhn sweep FILE`: run it, look at it, or leave it to the background."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.config.section import Scalar
from experiments.arguments import add_set_option
from experiments.run.interrupts import terminate_as_interrupt
from experiments.run.presets import PATH_KEYS, parse_assignment
from experiments.run.progress import clock
from experiments.sweep.plan import Plan

FAILED, INTERRUPTED = 1, 130
LOG = "sweep.log"
COLOURS = {"completed": "green", "running": "cyan", "failed": "bold red", "cut off": "yellow"}


def add_sweep_parser(commands: Any) -> None:
    """Add `sweep` to the command line."""
    command = commands.add_parser("sweep", help="run a grid of settings and seeds; resumable")
    command.add_argument("file", metavar="STUDY|FILE.toml", help="see `mh-pfedhn list`")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at the same time")
    command.add_argument("--background", action="store_true", help="detach, and write a log")
    command.add_argument("--status", action="store_true", help="show how far it is, run nothing")
    command.add_argument("--data-dir", metavar="DIR", help="local data instead of the hub")
    command.add_argument("--output-dir", metavar="DIR", default="", help="folder of its cells")
    add_set_option(command, "settings of all cells, over those of the file")
    command.set_defaults(command=sweep)


def sweep(args: argparse.Namespace) -> int:
    """Run a sweep, or show its status."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    plan = Plan.load(args.file, _common(args), args.output_dir)
    if args.status:
        return show_status(plan, console)
    if args.background:
        return _in_background(plan, args, console)
    return _run(plan, max(1, args.jobs), console)


def _common(args: argparse.Namespace) -> dict[str, Scalar]:
    """Return the settings of all cells that the command line gives."""
    common: dict[str, Scalar] = dict(parse_assignment(text) for text in args.set)
    if args.data_dir:
        common["data-dir"] = args.data_dir
    for key in PATH_KEYS:
        if common.get(key):
            common[key] = str(Path(str(common[key])).expanduser().resolve())
    return common


def _repeated(args: argparse.Namespace) -> list[str]:
    """Return the arguments that name the same cells again."""
    return [
        args.file,
        *(["--data-dir", args.data_dir] if args.data_dir else []),
        *(["--output-dir", args.output_dir] if args.output_dir else []),
        *(["--set", *args.set] if args.set else []),
    ]


def show_status(plan: Plan, console: Console) -> int:
    """Print a line for each cell; exit status 1 when a cell failed."""
    from experiments.sweep.runner import holder

    pid = holder(plan.folder)
    table, counts = status_table(plan)
    console.print(table)
    console.print()
    parts = [f"{number} {state}" for state, number in counts.items()]
    console.print(f"{len(plan.cells)} cells: {', '.join(parts)}", highlight=False)
    how = f"running as process {pid}" if pid else "not running"
    if not pid and (left := counts.get("running")):
        how += ", but " + (f"{left} cells run" if left > 1 else "1 cell runs") + " on: the next "
        how += "sweep follows " + ("them" if left > 1 else "it")
    console.print(f"{how}; folder {plan.folder}", highlight=False, soft_wrap=True)
    return FAILED if counts.get("failed") else 0


def status_table(plan: Plan) -> tuple[Table, dict[str, int]]:
    """Return a line for each cell, and how many cells are in which state."""
    from experiments.report.terminal import percent
    from experiments.sweep.cells import standing

    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for name, justify in (("cell", "left"), ("state", "left"), ("round", "right"),
                          ("accuracy", "right"), ("time", "right")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    counts: dict[str, int] = {}
    for cell in plan.cells:
        now = standing(cell)
        counts[now.state] = counts.get(now.state, 0) + 1
        colour = COLOURS.get(now.state, "dim")
        table.add_row(
            cell.name,
            f"[{colour}]{now.state}[/]",
            f"{now.server_round}/{cell.rounds}",
            percent(now.accuracy),
            clock(now.seconds) if now.server_round else "-",
        )
        if now.state == "failed":
            table.add_row(f"  [red]{escape(now.reason)}[/]")
    return table, counts


def _in_background(plan: Plan, args: argparse.Namespace, console: Console) -> int:
    from experiments.sweep.runner import detach, own

    with own(plan.folder):  # refuse now, not in a log that nobody reads
        pass
    log = plan.folder / LOG
    again = _repeated(args)
    process = detach([*again, "--jobs", str(args.jobs)], log)
    console.print(
        f"{len(plan.cells)} cells run in the background as process {process.pid}\n"
        f"log     {log}\n"
        f"status  mh-pfedhn sweep {shlex.join(again)} --status\n"
        f"stop    kill {process.pid}    (the same command goes on where it was)",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _run(plan: Plan, jobs: int, console: Console) -> int:
    from experiments.sweep.display import Display
    from experiments.sweep.runner import Runner

    name = escape(plan.description) or plan.file.stem
    console.print(f"[bold]{name}[/]: {len(plan.cells)} cells in {plan.folder}", highlight=False)
    try:
        with terminate_as_interrupt():
            failed = Runner(plan, Display(console, jobs=jobs), jobs=jobs).run()
    except KeyboardInterrupt:
        console.print("[bold red]interrupted[/]; the same command goes on where it was")
        return INTERRUPTED
    for cell in failed:
        console.print(f"[bold red]failed[/]  {cell.folder}", highlight=False, soft_wrap=True)
    if failed:
        console.print("what they said is in console.log and run.log; the same command tries again")
    console.print(f"\nnext: mh-pfedhn report {plan.folder}", highlight=False, soft_wrap=True)
    return FAILED if failed else 0
