"""The command line: `mh-pfedhn run NAME`, `sweep FILE`, `report DIR` and all the others."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import MHpFedHNError
from experiments.console import add_set_option, make_console, say

USAGE_ERROR = 2
COMMANDS = {
    "run": (
        "run a preset or an experiment file",
        "experiments.__main__:add_run_parser",
    ),
    "new": (
        "a folder to start from: a model, data, a simulation",
        "experiments.examples.new:add_new_parser",
    ),
    "list": (
        "list presets and studies",
        "experiments.__main__:add_list_parser",
    ),
    "keys": (
        "what can be set, and what it means",
        "experiments.keys:add_keys_parser",
    ),
    "show": (
        "tables and pictures of a run",
        "experiments.__main__:add_show_parser",
    ),
    "compare": (
        "runs side by side: a table and a picture",
        "experiments.report.command:add_compare_parser",
    ),
    "report": (
        "one HTML page and a table about many runs",
        "experiments.report.command:add_report_parser",
    ),
    "sweep": (
        "run a grid of settings and seeds; resumable",
        "experiments.report.command:add_sweep_parser",
    ),
    "export-partitions": (
        "a run's partitions, for PFLlib and HtFLlib",
        "experiments.report.exchange:add_export_parser",
    ),
    "import-results": (
        "results of these, for compare and report",
        "experiments.report.exchange:add_import_parser",
    ),
    "track": (
        "write runs for TensorBoard, W&B or MLflow",
        "experiments.report.track:add_track_parser",
    ),
    "join": (
        "take part in a federation with your own data",
        "experiments.deploy.join:add_join_parser",
    ),
    "status": (
        "of a participant, or of a run's participants",
        "experiments.deploy.status:add_status_parser",
    ),
    "model": (
        "a participant's models: list, export, use",
        "experiments.deploy.models:add_model_parser",
    ),
    "contract": (
        "what a federation's participants agree on",
        "experiments.deploy.contract:add_contract_parser",
    ),
    "certs": (
        "make the keys and certificates of a deployment",
        "experiments.deploy.certificates:add_certs_parser",
    ),
    "superlink": (
        "run a SuperLink (words as of flower-superlink)",
        "experiments.deploy.superlink:add_superlink_parser",
    ),
    "serve": (
        "host the ServerApp of a SuperLink's runs",
        "experiments.deploy.serve:add_serve_parser",
    ),
    "forget": (
        "take a participant out of a stopped run",
        "experiments.deploy.forget:add_forget_parser",
    ),
    "rename": (
        "give a participant of a stopped run another name",
        "experiments.deploy.rename:add_rename_parser",
    ),
    "attack": (
        "what a run gives away: five attacks",
        "experiments.attacks.command:add_attack_parser",
    ),
    "liars": (
        "what participants that lie do to the others",
        "experiments.attacks.command:add_liars_parser",
    ),
    "bench": (
        "measure this machine (needs a checkout)",
        "experiments.bench:add_bench_parser",
    ),
    "completion": (
        "print what bash or zsh needs to complete words",
        "experiments.__main__:add_completion_parser",
    ),
}
"""What each is for, and who adds its words: imported when it is used, for that takes seconds."""

OWN_CODE = ("run", "sweep", "attack", "liars", "bench")
"""Where a config may name a "module:factory" of the user's: it lives where they work. Elsewhere a
file that lies in some folder by chance, or by somebody's wish, is not imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 only when everything was done."""
    words = sys.argv[1:] if argv is None else argv
    args = parser(next((word for word in words if word in COMMANDS), "")).parse_args(words)
    if words[:1] and words[0] in OWN_CODE and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return int(args.command(args))
    except MHpFedHNError as error:
        say(Console(stderr=True), "error", style="bold red", end=": ")
        say(Console(stderr=True), str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `| head`: nobody reads on, and Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE_ERROR


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
    return launch(chosen, console, tracker=args.track)


def list_presets(args: argparse.Namespace) -> int:
    """List the presets, and the studies."""
    from experiments.report.listing import preset_table, study_table
    from experiments.report.sweep_file import STUDIES, SweepFile
    from experiments.run.presets import Preset, preset_names

    presets = [Preset.load(name) for name in preset_names()]
    studies = {n: SweepFile.load(STUDIES / f"{n}.toml") for n in preset_names(STUDIES)}
    if args.json:
        told = {
            "presets": {preset.name: preset.description for preset in presets},
            "studies": {name: study.description for name, study in studies.items()},
        }
        print(json.dumps(told, indent=2))
        return 0
    console = make_console()
    console.print(preset_table(presets))
    console.print()
    console.print(study_table(studies))
    return 0


def show(args: argparse.Namespace) -> int:
    """Show a finished run: tables, and pictures drawn into its folder."""
    from experiments.report import terminal as report
    from experiments.report.runs import find_run
    from experiments.run import launch
    from server_app.output.curves import Reference, draw_curves

    console, found = make_console(), find_run(args.run)
    if args.json:
        print(json.dumps(found.summary, indent=2))
        return 0
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


def print_completion(args: argparse.Namespace) -> int:
    """Print a shell's completion of this command line; `eval` it, or put it where shells look."""
    import shtab

    print(shtab.complete(parser(), args.shell))
    return 0


class About:
    """Subparsers whose next one is said to be about something."""

    def __init__(self, commands: Any, about: str) -> None:
        self._commands, self._about = commands, about

    def add_parser(self, name: str, **settings: Any) -> argparse.ArgumentParser:
        """Add it, as argparse's subparsers do."""
        found: argparse.ArgumentParser = self._commands.add_parser(
            name, help=self._about, **settings
        )
        return found


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the command line, with the words of one command, or of all."""
    found = argparse.ArgumentParser(
        prog="mh-pfedhn",
        description="Personalised federated learning across different architectures, on Flower.",
    )
    commands = found.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (about, place) in COMMANDS.items():
        if command in (None, name):
            module, _, adder = place.partition(":")
            getattr(import_module(module), adder)(About(commands, about))
        else:
            commands.add_parser(name, help=about)
    return found


def add_list_parser(commands: Any) -> None:
    """Add `list`."""
    command = commands.add_parser("list")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(command=list_presets)


def add_show_parser(commands: Any) -> None:
    """Add `show`."""
    command = commands.add_parser("show")
    command.add_argument("run", metavar="RUN", help="a run folder, or its name")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--reference", metavar="FILE.json", help="a curve to compare with")
    form.add_argument("--json", action="store_true", help="its summary, for programs")
    command.set_defaults(command=show)


def add_completion_parser(commands: Any) -> None:
    """Add `completion`."""
    command = commands.add_parser("completion")
    command.add_argument("shell", choices=("bash", "zsh"))
    command.set_defaults(command=print_completion)


def add_run_parser(commands: Any) -> None:
    """Add `run`."""
    from experiments.report.track import TRACKERS

    command = commands.add_parser("run")
    command.add_argument("experiment", metavar="NAME|FILE.toml", help="see `mh-pfedhn list`")
    command.add_argument("--rounds", type=int, metavar="N", help="passes over the clients")
    command.add_argument("--clients", type=int, metavar="N", help="number of simulated clients")
    command.add_argument("--seed", type=int, metavar="N")
    command.add_argument("--data-dir", metavar="DIR", help="local data instead of the hub")
    command.add_argument("--output-dir", metavar="DIR", help="this run's own folder")
    command.add_argument("--engine", metavar="ray|inprocess", help="where it runs")
    add_set_option(command, "any key of the run config or of [engine]")
    command.add_argument("--track", choices=TRACKERS, help="where the rounds go as well")
    command.set_defaults(command=run)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
