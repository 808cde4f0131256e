"""The benchmark from end to end: measure the parts, write bench.json, print the table."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common.errors import ConfigError, unknown_name
from common.files import replace_file
from experiments.bench import PARTS
from experiments.benchmarks import rounds
from experiments.benchmarks.batched import batched_training
from experiments.benchmarks.client import client_step, forward_flops, step_flops
from experiments.benchmarks.growth import grow
from experiments.benchmarks.machine import Machine, inspect_machine
from experiments.benchmarks.memory import memory
from experiments.benchmarks.rounds import SCHEDULES, Workload, attempt
from experiments.benchmarks.server import server_table
from experiments.benchmarks.synthetic import IDLE_PARAMETERS
from experiments.benchmarks.table import print_tables
from experiments.benchmarks.wire import wire_table

SIZES = [(n, k) for k in (IDLE_PARAMETERS, 2_000_000, 11_000_000) for n in (10, 50, 200, 1000)]
QUICK_SIZES = [(4, 6_000)]
MANY_CLIENTS = 1000
RUNS = "bench-runs"
"""Scratch below the output folder, emptied: nobody keeps runs of their own under that name."""


def run_suite(args: argparse.Namespace) -> int:
    """Measure what `--parts` names; returns 0. bench.json is written after every part."""
    parts = [part.strip() for part in args.parts.split(",")]
    for part in parts:
        if part not in PARTS:
            raise ConfigError("bench: " + unknown_name("part", part, PARTS))
    folder = Path(args.output_dir).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = str(Path(args.data_dir).expanduser().resolve()) if args.data_dir else ""
    work = Workload(4 if args.quick else args.clients, data_dir, folder / RUNS, args.quick)
    work.folder.mkdir(exist_ok=True)
    clear_runs(work.folder)
    console = Console(width=120)
    machine = inspect_machine(args.repeats, size=256 if args.quick else 2048)
    results = earlier(folder / "bench.json", machine, quick=args.quick)
    results |= {"machine": machine.facts(), "quick": args.quick}
    for part in [part for part in PARTS if part in parts]:
        console.print(f"measuring: {part}", style="dim")
        results[part] = _measure(part, work, machine, args.repeats)
        replace_file(folder / "bench.json", json.dumps(results, indent=2))
    if "runtime" in results and "round" in results:
        results["runtime"] |= overhead(results["runtime"], results["round"])
        replace_file(folder / "bench.json", json.dumps(results, indent=2))
    print_tables(results, console)
    console.print(f"\nfigures in {folder / 'bench.json'}", soft_wrap=True)
    failed = any(failures(results[part]) for part in parts)
    if failed:
        console.print("some measurements failed: 'traceback' in bench.json says where", style="red")
    else:
        clear_runs(work.folder)
    return int(failed)


def clear_runs(folder: Path) -> None:
    """Remove the runs of earlier measurements; decoded data stay."""
    for path in folder.iterdir():
        if path.name != "cache" and path.is_dir():
            shutil.rmtree(path)


def earlier(path: Path, machine: Machine, *, quick: bool) -> dict[str, Any]:
    """Return the parts measured before on the same machine, with sizes of the same kind."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        before = [found["machine"][key] for key in ("cpu", "gpu", "threads", "torch")]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    same = before == [machine.cpu, machine.gpu, machine.threads, machine.torch]
    return found if same and found.get("quick") == quick else {}


def failures(found: Any) -> list[str]:
    """Return what went wrong anywhere in a part; too little memory for a size is no failure."""
    if isinstance(found, dict):
        own = [str(found["skipped"])] if found.get("failed") else []
        return own + [text for value in found.values() for text in failures(value)]
    if isinstance(found, list):
        return [text for value in found for text in failures(value)]
    return []


def _measure(part: str, work: Workload, machine: Machine, repeats: int) -> dict[str, Any]:
    quick = work.quick
    if part == "server":
        return server(server_table(QUICK_SIZES if quick else SIZES, machine, repeats))
    if part == "client":
        return client(("cnn",) if quick else ("cnn", "vgg8", "resnet10"), machine, repeats)
    if part == "batched":
        return batched(work, repeats)
    if part == "wire":
        return wire_table(6_000 if quick else IDLE_PARAMETERS, machine, repeats)
    if part == "round":
        return full_round(work, machine)
    if part == "runtime":
        return runtime(work)
    if part == "memory":
        return memory(work if quick else replace(work, num_clients=MANY_CLIENTS))
    return grow(work, rounds=3 if quick else 300, clients=(2,) if quick else (10, 20, 40, 80))


def server(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the row of 50 CNN clients first: it is the one that is held against a target.

    Parallel is what the presets with 50 clients use: least squares, trunk and embeddings at rest.
    """
    target = [r for r in rows if (r["num_clients"], r["num_parameters"]) == (50, IDLE_PARAMETERS)]
    first = (target or rows)[0]
    keys = ("sequential_seconds", "reference_seconds")
    found: dict[str, Any] = {key: first[key] for key in keys if key in first}
    rest = "in_turns" if "in_turns" in first else "at_rest"
    rules = {"": rest, "adam_": "", "least_squares_": "least_squares"}
    for prefix, name in rules.items():
        row = first.get(name, {}) if name else first
        for key in ("parallel_seconds", "ratio", "cpu_ratio"):
            if key in row:
                found[prefix + key] = row[key]
    return found | {"sizes": rows}


def client(names: tuple[str, ...], machine: Machine, repeats: int) -> dict[str, Any]:
    """Time a step of each model on the CPU, and on the GPU where there is one; CNN/CPU first."""
    models = {
        f"{name}/{device}": attempt(
            partial(client_step, name, machine, repeats, device=torch.device(device))
        )
        for device in devices()
        for name in names
    }
    first = models["cnn/cpu"]
    keys = ("step_seconds", "dataloader_step_seconds", "ratio")
    return {key: first[key] for key in keys if key in first} | {"models": models}


def batched(work: Workload, repeats: int) -> dict[str, Any]:
    """Time batched training on the CPU, and on the GPU where there is one."""
    found = {}
    for device in devices():
        # two steps a client tell enough on a CPU; a GPU gets CIFAR-100's twelve
        steps = 1 if work.quick else 12 if device == "cuda" else 2
        sizes = {"num_clients": work.num_clients, "steps": steps}
        measure = partial(batched_training, "cnn", repeats, **sizes, device=torch.device(device))
        found[f"cnn/{device}"] = attempt(measure)
    return found


def devices() -> list[str]:
    """Return where clients can be measured here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def full_round(work: Workload, machine: Machine) -> dict[str, Any]:
    """Measure a full round by engine and schedule, and the clear sequential implementation.

    The latter comes first: the in-process engine tunes this process's memory allocator. Where there
    is a GPU, the rows with "gpu" use it for clients and server, and the others the CPU alone.
    """
    rows: dict[str, Any] = {"reference": attempt(rounds.reference, work)}
    if "cuda" in devices():
        rows["reference-gpu"] = attempt(rounds.reference, work, "cuda")
        on_gpu = {"device": "cuda", "server_device": "cuda", **SCHEDULES["parallel"]}
        rows["batched-gpu"] = attempt(rounds.batched, work, work.config("batched-gpu", **on_gpu))
        one_by_one = work.config("inprocess-gpu", **on_gpu)
        rows["inprocess-gpu"] = attempt(partial(rounds.inprocess, workers=1), work, one_by_one)
    for name, schedule in SCHEDULES.items():
        config = work.config(f"inprocess-{name}", **schedule)
        rows[f"inprocess-{name}"] = attempt(rounds.inprocess, work, config)
        if not work.quick:
            config = work.config(f"ray-{name}", **schedule)
            rows[f"ray-{name}"] = attempt(rounds.ray, work, config)
    result: dict[str, Any] = {
        "reference_seconds": rows["reference"].get("total"),
        "ray_seconds": rows.get("ray-parallel", {}).get("seconds_round"),
        "inprocess_seconds": rows["inprocess-parallel"].get("seconds_round"),
        "reference_cpu_seconds": rows["reference"].get("cpu_seconds"),
        "ray_cpu_seconds": rows.get("ray-parallel", {}).get("cpu_seconds"),
        "inprocess_cpu_seconds": rows["inprocess-parallel"].get("cpu_seconds"),
        "num_clients": work.num_clients,
        "data": "cifar100" if work.data_dir else "synthetic",
        "runs": rows,
    }
    result |= round_ratios(result)
    if "batched-gpu" in rows:
        result["gpu_reference_seconds"] = rows["reference-gpu"].get("total")
        result["gpu_batched_seconds"] = rows["batched-gpu"].get("seconds_round")
        if result["gpu_reference_seconds"] and result["gpu_batched_seconds"]:
            result["gpu_ratio"] = result["gpu_reference_seconds"] / result["gpu_batched_seconds"]
    if not work.quick and result["inprocess_seconds"]:
        train, test = step_flops("cnn", 64) / 64, forward_flops("cnn", 64) / 64
        flops = 50_000 * (0.75 * train + 0.25 * test)
        result["bounds"] = machine.bound(result["inprocess_seconds"], flops=flops)
    return result


def round_ratios(found: dict[str, Any]) -> dict[str, float]:
    """Say how many times as fast as the reference each engine is; what was not run has none."""
    reference = found["reference_seconds"]
    keys = {"ray_ratio": "ray_seconds", "inprocess_ratio": "inprocess_seconds"}
    return {name: reference / found[key] for name, key in keys.items() if reference and found[key]}


def runtime(work: Workload) -> dict[str, Any]:
    """Measure rounds of idle clients: what the engines cost by themselves, in seconds a round."""
    found = {"inprocess": attempt(rounds.inprocess, work, rounds.idle_config(work, "idle"))}
    if not work.quick:
        found["ray"] = attempt(rounds.ray, work, rounds.idle_config(work, "idle-ray"))
    for row in found.values():
        if "seconds_round" in row:
            row["idle_seconds"] = row["seconds_round"] - row["seconds_server"]
        if "cpu_seconds" in row:
            row["idle_cpu_seconds"] = row["cpu_seconds"] - row["seconds_server"]
    return {"engines": found, "bounded_by": "process start, message store, polling"}


def overhead(idle: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Return the share of a full parallel round that an idle round's runtime makes up."""
    found: dict[str, Any] = {}
    for engine in ("ray", "inprocess"):
        row = idle["engines"].get(engine, {})
        for kind in ("", "cpu_"):
            cost, total = row.get(f"idle_{kind}seconds"), full.get(f"{engine}_{kind}seconds")
            if cost is not None and total:
                found.setdefault(f"overhead_{kind}fraction", cost / total)
                found.setdefault("overhead_engine", engine)
    return found
