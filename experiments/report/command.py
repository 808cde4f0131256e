"""`mh-pfedhn compare RUN...`, `mh-pfedhn report DIR` and `mh-pfedhn sweep FILE`."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from common.config.section import Scalar
from common.errors import ConfigError
from experiments.console import add_set_option, make_console, say
from experiments.run.presets import parse_assignment, resolve_paths

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
MAPS = 6


def add_compare_parser(commands: Any) -> None:
    """Add `compare` to the command line."""
    command = commands.add_parser("compare")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, names, or sweeps")
    command.add_argument("--output", metavar="FILE.png", help="the picture; default compare.png")
    command.add_argument(
        "--bytes", choices=("up", "both"), default="both",
        help="traffic in the picture: what clients send, or both directions (default)",
    )  # fmt: skip
    command.add_argument(
        "--against", metavar="NAME", default="",
        help="a method or variant of the table: what each participant gains over it",
    )  # fmt: skip
    command.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    command.set_defaults(command=compare)


def add_report_parser(commands: Any) -> None:
    """Add `report` to the command line."""
    command = commands.add_parser("report")
    command.add_argument("folder", metavar="DIR", help="the folder that holds the runs")
    command.add_argument(
        "--maps", type=int, default=MAPS, metavar="N", help=f"maps of embeddings, default {MAPS}"
    )
    command.set_defaults(command=report)


def add_sweep_parser(commands: Any) -> None:
    """Add `sweep` to the command line."""
    command = commands.add_parser("sweep")
    command.add_argument("file", metavar="STUDY|FILE.toml", help="see `mh-pfedhn list`")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at the same time")
    command.add_argument("--background", action="store_true", help="detach, and write a log")
    command.add_argument("--status", action="store_true", help="show how far it is, run nothing")
    command.add_argument("--data-dir", metavar="DIR", help="local data instead of the hub")
    command.add_argument("--output-dir", metavar="DIR", default="", help="folder of its cells")
    add_set_option(command, "settings of all cells, over those of the file")
    command.set_defaults(command=sweep)


def compare(args: argparse.Namespace) -> int:
    """Print the comparison of some runs, and draw their accuracy."""
    from experiments.report.against import columns_against
    from experiments.report.figures import draw_comparison
    from experiments.report.groups import load_study
    from experiments.report.lines import TRAFFIC
    from experiments.report.tables import markdown, rich_table

    console = make_console(wide=True)
    study = load_study(args.runs)
    more = columns_against(study, args.against) if args.against else []
    if args.markdown:
        print(markdown(study, source=shlex.join(["mh-pfedhn", "compare", *args.runs]), more=more))
        return 0
    console.print(rich_table(study, more))
    console.print(
        "[dim]last round unless said otherwise; per cent; mean ± standard error over seeds; "
        "completed runs only[/]"
    )
    path = Path(args.output or "compare.png").expanduser().absolute()
    if draw_comparison(study, path, traffic=TRAFFIC[args.bytes]):
        say(console, f"picture  {path}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Write report.html and report.md into the folder of the runs."""
    os.environ.update(OFFLINE)  # label overlap needs data that is here: nothing is downloaded
    from experiments.report.groups import load_study
    from experiments.report.page import write_report
    from experiments.report.tables import rich_table

    console = make_console(wide=True)
    folder = Path(args.folder).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Give the folder that holds the runs.")
    study = load_study([str(folder)])
    paths = write_report(folder, study, num_maps=args.maps)
    console.print(rich_table(study))
    say(console, f"\n{len(study.runs)} runs")
    for path in paths:
        say(console, f"written  {path}")
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Run a sweep, here or in the background, or show how far it is."""
    from experiments.report import sweep as runner
    from experiments.report.plan import Plan

    console = make_console(wide=True)
    common: dict[str, Scalar] = dict(parse_assignment(text) for text in args.set)
    common |= {"data-dir": args.data_dir} if args.data_dir else {}
    wanted = (args.file, resolve_paths(common, base=Path.cwd()), args.output_dir)
    plan = Plan.load(*wanted)
    if args.status:
        return runner.show_status(plan, console)
    if not args.background:
        code = runner.Sweep(plan, console, jobs=max(1, args.jobs)).run()
        if code or not plan.is_trial:
            return code
        return runner.Sweep(Plan.load(*wanted), console, jobs=max(1, args.jobs)).run()
    again = [args.file]
    again += ["--data-dir", args.data_dir] if args.data_dir else []
    again += ["--output-dir", args.output_dir] if args.output_dir else []
    again += ["--set", *args.set] if args.set else []
    pid, log = runner.detach(plan, [*again, "--jobs", str(args.jobs)])
    say(
        console,
        f"{len(plan.cells)} {'trials, and then cells,' if plan.is_trial else 'cells'} run in the "
        f"background as process {pid}\n"
        f"log     {log}\n"
        f"status  mh-pfedhn sweep {shlex.join(again)} --status\n"
        f"stop    kill {pid}    (the same command goes on where it was)",
    )
    return 0
