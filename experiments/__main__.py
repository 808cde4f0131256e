"""The command line: `mh-pfedhn run NAME`, `sweep FILE`, `report DIR` and all the others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import MHpFedHNError
from experiments.attacks.command import add_attack_parser, add_liars_parser
from experiments.bench import add_bench_parser
from experiments.console import add_set_option, make_console, say
from experiments.deploy.certificates import add_certs_parser
from experiments.deploy.contract import add_contract_parser
from experiments.deploy.forget import add_forget_parser
from experiments.deploy.join import add_join_parser
from experiments.deploy.models import add_model_parser
from experiments.deploy.serve import add_serve_parser
from experiments.deploy.status import add_status_parser
from experiments.deploy.superlink import add_superlink_parser
from experiments.keys import add_keys_parser
from experiments.report.command import add_study_parsers
from experiments.report.events import add_tensorboard_parser

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 only when everything was done."""
    args = _parser().parse_args(argv)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own "module:factory" lives where they work
    try:
        code: int = args.command(args)
    except MHpFedHNError as error:
        say(Console(stderr=True), "error", style="bold red", end=": ")
        say(Console(stderr=True), str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130
    return code


def run(args: argparse.Namespace) -> int:
    """Run a preset or an experiment file to its end."""
    from experiments.run.launch import launch
    from experiments.run.presets import Preset

    preset = Preset.load(args.experiment)
    engine = {"name": args.engine, "num-clients": args.clients}
    config = {
        "rounds": args.rounds,
        "seed": args.seed,
        "data-dir": _absolute(args.data_dir),
        "output-dir": _absolute(args.output_dir),
    }
    chosen = preset.with_engine(_given(engine)).with_settings(args.set).with_config(_given(config))
    console = make_console()
    say(console, preset.name, style="bold", end=": ")
    say(console, preset.description)
    changes = [f"{key}={value}" for key, value in chosen.changes_from(preset).items()]
    if changes:
        say(console, "but " + ", ".join(changes))
    return launch(chosen, console, tensorboard=args.tensorboard)


def list_presets(args: argparse.Namespace) -> int:
    """List the presets, and the studies."""
    from experiments.report.plan import STUDIES, Plan
    from experiments.report.terminal import preset_table, study_table
    from experiments.run.presets import Preset, preset_names

    console = make_console()
    console.print(preset_table([Preset.load(name) for name in preset_names()]))
    console.print()
    console.print(study_table([Plan.load(name) for name in preset_names(STUDIES)]))
    return 0


def show(args: argparse.Namespace) -> int:
    """Show a finished run: tables, and pictures drawn into its folder."""
    from experiments.report import terminal as report
    from experiments.report.runs import find_run
    from experiments.run import launch
    from server_app.output.curves import Reference, draw_curves

    console, found = make_console(), find_run(args.run)
    launch.show(found.folder, console)
    if args.reference:
        reference = Reference.load(Path(args.reference).expanduser())
        path = draw_curves(
            found.folder, reference=reference, target=found.folder / "curves-reference.png"
        )
        say(console, f"picture  {path}")
        say(console, f"\nreference: {reference.source}")
        console.print(report.reference_table(found, reference))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mh-pfedhn",
        description="Personalised federated learning across different architectures, on Flower.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    command = commands.add_parser("list", help="list presets and studies")
    command.set_defaults(command=list_presets)
    add_keys_parser(commands)
    command = commands.add_parser("show", help="tables and pictures of a run")
    command.add_argument("run", metavar="RUN", help="a run folder, or its name")
    command.add_argument("--reference", metavar="FILE.json", help="a curve to compare with")
    command.set_defaults(command=show)
    add_study_parsers(commands)
    add_tensorboard_parser(commands)
    add_join_parser(commands)
    add_status_parser(commands)
    add_forget_parser(commands)
    add_model_parser(commands)
    add_superlink_parser(commands)
    add_serve_parser(commands)
    add_certs_parser(commands)
    add_contract_parser(commands)
    add_attack_parser(commands)
    add_bench_parser(commands)
    add_liars_parser(commands)
    return parser


def _add_run(commands: Any) -> None:
    command = commands.add_parser("run", help="run a preset or an experiment file")
    command.add_argument("experiment", metavar="NAME|FILE.toml", help="see `mh-pfedhn list`")
    command.add_argument("--rounds", type=int, metavar="N", help="passes over the clients")
    command.add_argument("--clients", type=int, metavar="N", help="number of simulated clients")
    command.add_argument("--seed", type=int, metavar="N")
    command.add_argument("--data-dir", metavar="DIR", help="local data instead of the hub")
    command.add_argument("--output-dir", metavar="DIR", help="this run's own folder")
    command.add_argument("--engine", metavar="ray|inprocess", help="where it runs")
    add_set_option(command, "any key of the run config or of [engine]")
    command.add_argument("--tensorboard", action="store_true", help="write event files as well")
    command.set_defaults(command=run)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
