"""`mh-pfedhn compare RUN...` and `mh-pfedhn report DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
MAPS = 6


def add_study_parsers(commands: Any) -> None:
    """Add `compare` and `report` to the command line."""
    command = commands.add_parser("compare", help="runs side by side: a table and a picture")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, names, or sweeps")
    command.add_argument("--output", metavar="FILE.png", help="the picture; default compare.png")
    command.add_argument(
        "--bytes", choices=("up", "both"), default="both",
        help="traffic in the picture: what clients send, or both directions (default)",
    )  # fmt: skip
    command.set_defaults(command=compare)
    command = commands.add_parser("report", help="one HTML page and a table about many runs")
    command.add_argument("folder", metavar="DIR", help="the folder that holds the runs")
    command.add_argument(
        "--maps", type=int, default=MAPS, metavar="N", help=f"maps of embeddings, default {MAPS}"
    )
    command.set_defaults(command=report)


def compare(args: argparse.Namespace) -> int:
    """Print the comparison of some runs, and draw their accuracy."""
    from experiments.report.curves import TRAFFIC
    from experiments.report.groups import load_named
    from experiments.report.picture import draw_comparison
    from experiments.report.tables import rich_table

    console = _console()
    study = load_named(args.runs)
    console.print(rich_table(study))
    console.print(
        "[dim]last round unless said otherwise; per cent; mean ± standard error over seeds; "
        "completed runs only[/]"
    )
    path = Path(args.output or "compare.png").expanduser().absolute()
    if draw_comparison(study, path, traffic=TRAFFIC[args.bytes]):
        console.print(f"picture  {path}", highlight=False, soft_wrap=True)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write report.html and report.md into the folder of the runs."""
    os.environ.update(OFFLINE)  # label overlap needs data that is here: nothing is downloaded
    from experiments.report.groups import load_study
    from experiments.report.page import default_source, write_report
    from experiments.report.tables import rich_table

    started, console = perf_counter(), _console()
    folder = Path(args.folder).expanduser().resolve()
    study = load_study(folder)
    page, table = write_report(study, default_source(folder), num_maps=args.maps)
    console.print(rich_table(study))
    seconds = perf_counter() - started
    console.print(f"\n{len(study.members)} runs in {seconds:.1f} s", highlight=False)
    for path in (page, table):
        console.print(f"written  {path}", highlight=False, soft_wrap=True)
    return 0


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=170)
