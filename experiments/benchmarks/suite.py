"""The benchmark from end to end: measure the parts, write bench.json, print the tables."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from common.errors import ConfigError, unknown_name
from common.files import replace_file
from experiments.bench import PARTS
from experiments.benchmarks.client import batched_part, client_part, wire_part
from experiments.benchmarks.measuring import Machine, Row, attempt, inspect_machine, quiet
from experiments.benchmarks.memory import growth_part, memory_part, registered_part
from experiments.benchmarks.rounds import Workload, overhead, round_part, runtime_part
from experiments.benchmarks.server import server_part
from experiments.benchmarks.straggler import straggler_part
from experiments.benchmarks.synthetic import IDLE_PARAMETERS
from experiments.benchmarks.tables import print_tables
from experiments.benchmarks.worker import worker_part

MANY_CLIENTS = 1000
RUNS = "bench-runs"
"""Scratch below the output folder, emptied: nobody keeps runs of their own under that name."""


def run_suite(args: argparse.Namespace) -> int:
    """Measure what `--parts` names, writing bench.json each time; return 1 if something failed."""
    parts = [part.strip() for part in args.parts.split(",")]
    for part in parts:
        if part not in PARTS:
            raise ConfigError("bench: " + unknown_name("part", part, PARTS))
    folder = Path(args.output_dir).expanduser().resolve()
    data_dir = str(Path(args.data_dir).expanduser().resolve()) if args.data_dir else ""
    work = Workload(4 if args.quick else args.clients, data_dir, folder / RUNS, args.quick)
    work.folder.mkdir(parents=True, exist_ok=True)
    clear_runs(work.folder)
    quiet()
    console, figures = Console(width=140), folder / "bench.json"
    machine = inspect_machine(args.repeats, size=256 if args.quick else 2048)
    results = earlier(figures, machine, quick=args.quick)
    results |= {"machine": asdict(machine), "quick": args.quick}
    measure = _measures(work, machine, args.repeats)
    for part in [part for part in PARTS if part in parts]:
        console.print(f"measuring: {part}", style="dim")
        found = attempt(measure[part])
        results[part] = found if "rows" in found else {"rows": {part: found}}
        if "runtime" in results and "round" in results:
            results["runtime"] |= overhead(results["runtime"], results["round"])
        replace_file(figures, json.dumps(results, indent=2))
    print_tables(results, console)
    console.print(f"\nfigures in {figures}", highlight=False, soft_wrap=True)
    failed = any(row.get("failed") for part in parts for row in results[part]["rows"].values())
    if failed:
        console.print("some measurements failed: 'traceback' in bench.json says where", style="red")
    else:
        clear_runs(work.folder)
    return int(failed)


def _measures(work: Workload, machine: Machine, repeats: int) -> dict[str, Callable[[], Row]]:
    quick = work.quick
    models = ("cnn",) if quick else ("cnn", "vgg8", "resnet10", "vit")
    many = work if quick else replace(work, num_clients=MANY_CLIENTS)
    rounds, counts = (3, (2,)) if quick else (300, (10, 20, 40, 80))
    usual_s, turns = (0.2, 1) if quick else (4.0, 2)
    return {
        "server": lambda: server_part(machine, quick=quick, repeats=repeats),
        "client": lambda: client_part(models, machine, repeats),
        "batched": lambda: batched_part(work.num_clients, repeats, quick=quick),
        "wire": lambda: wire_part(6_000 if quick else IDLE_PARAMETERS, machine, repeats),
        "round": lambda: round_part(work),
        "runtime": lambda: runtime_part(work),
        "memory": lambda: memory_part(many),
        "growth": lambda: growth_part(work, rounds=rounds, clients=counts),
        "registered": lambda: registered_part(
            work, registered=(3,) if quick else (100, 1000, 10_000), training=2 if quick else 100
        ),
        "worker": lambda: worker_part(work.folder, repeats=turns),
        "straggler": lambda: straggler_part(work, rounds=8, usual_s=usual_s),
    }


def clear_runs(folder: Path) -> None:
    """Remove the runs of earlier measurements; decoded data stay."""
    for path in folder.iterdir():
        if path.name != "cache" and path.is_dir():
            shutil.rmtree(path)


def earlier(path: Path, machine: Machine, *, quick: bool) -> Row:
    """Return the parts measured before on the same machine, with sizes of the same kind."""
    try:
        found: Row = json.loads(path.read_text())
        before = [found["machine"][key] for key in ("cpu", "gpu", "threads", "torch")]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if before != [machine.cpu, machine.gpu, machine.threads, machine.torch]:
        return {}
    parts = {part: found[part] for part in PARTS if "rows" in found.get(part, {})}
    return parts if found.get("quick") == quick else {}
