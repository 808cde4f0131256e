"""`mh-pfedhn attack NAME RUN`: attack a finished, simulated run; `liars`: run one that is attacked.

Every attack sees what docs/privacy.md says that the server or another participant sees, nothing
more. A table is printed, and attack-NAME.json is written to the run's folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.table import Table

from common.files import replace_file
from experiments.console import add_set_option, make_console, say
from experiments.run.presets import parse_assignment

if TYPE_CHECKING:
    from experiments.attacks.federation import Federation

Row = Mapping[str, Any]
Attack = Callable[["Federation", argparse.Namespace], Sequence[Row]]
ATTACKS = {
    "labels": "which classes a participant has, from the last layer of its delta",
    "membership": "whether an example was trained on, from a delta and from what others receive",
    "inversion": "the pictures of a batch, from the delta of one step on them",
    "likeness": "who is like whom, from the embeddings that the server keeps",
    "impersonate": "whether a node gets another participant's parameters by claiming its name",
}
LIES = (
    *("flip", "flip-5", "flip-100", "noise", "against"),
    *("constant", "zero", "mimic", "labels", "alike"),
)
"""What participants that lie send; `experiments.attacks.liars` has them."""


def add_attack_parser(commands: Any) -> None:
    """Add `attack` to the command line."""
    command = commands.add_parser("attack")
    words = "; ".join(f"{name}: {what}" for name, what in ATTACKS.items())
    command.add_argument("name", metavar="NAME", choices=[*ATTACKS], help=words)
    command.add_argument("run", metavar="RUN", help="a simulated run's folder, or its name")
    command.add_argument("--clients", type=int, default=10, metavar="N", help="victims")
    command.add_argument("--shadows", type=int, default=16, metavar="N", help="membership: models")
    command.add_argument("--pictures", type=int, default=1, metavar="N", help="inversion: 1 to 4")
    command.add_argument("--steps", type=int, default=400, metavar="N", help="inversion: of Adam")
    add_set_option(command, "answer with other settings than the run's")
    command.set_defaults(command=run_attack)


def add_liars_parser(commands: Any) -> None:
    """Add `liars` to the command line."""
    command = commands.add_parser("liars")
    command.add_argument("experiment", metavar="NAME|FILE.toml", help="see `mh-pfedhn list`")
    command.add_argument("--honest", type=int, default=10, metavar="N", help="honest participants")
    command.add_argument("--liars", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    command.add_argument("--lies", nargs="+", default=[*LIES], metavar="NAME", help=", ".join(LIES))
    command.add_argument("--data-dir", metavar="DIR", help="local data instead of the hub")
    add_set_option(command, "any key of the run config or of [engine]")
    command.set_defaults(command=run_liars)


def run_liars(args: argparse.Namespace) -> int:
    """Measure, and return the exit status."""
    from experiments.attacks.liars import measure  # imports torch: seconds

    return measure(args)


def run_attack(args: argparse.Namespace) -> int:
    """Attack and return the exit status; raise RunError where a run cannot be rebuilt."""
    from experiments.attacks.federation import Federation  # imports torch: seconds
    from experiments.report.runs import find_run

    federation = Federation(find_run(args.run), dict(map(parse_assignment, args.set)))
    attack: Attack = import_module(f"experiments.attacks.{args.name}").attack
    rows = [dict(row) for row in attack(federation, args)]
    facts = {"attack": args.name, "settings": federation.changed, "rows": rows}
    target = federation.run.folder / f"attack-{args.name}.json"
    replace_file(target, json.dumps(facts, indent=2))
    console = make_console()
    console.print(table_of(rows, title=f"{args.name}: {ATTACKS[args.name]}"))
    say(console, f"written  {target}")
    return 0


def table_of(rows: Sequence[Row], *, title: str) -> Table:
    """Lay rows out as a table; numbers with three digits behind the point."""
    table = Table(title=title, title_justify="left")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in cells))
    return table
