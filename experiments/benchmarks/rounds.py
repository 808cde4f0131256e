"""Whole rounds of the real apps, by engine and schedule, and what the engines cost by themselves.

The first round of a run pays for start-up (processes, imports, decoding) and the last one for the
final test of every client; the second of three is reported, in wall seconds and in CPU seconds of
all processes: those hold on a machine that others use too. The engines' own cost is measured with
clients that exchange a CNN's parameters and have nothing to compute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from client_app.data.examples import load_client_data
from client_app.models.registry import build_model
from common.config import RunConfig
from common.errors import RunError
from experiments.benchmarks.clear import reference_hypernet, reference_round
from experiments.benchmarks.measuring import Row, attempt, devices
from experiments.run.engines import processes
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from experiments.run.engines.superlink import RayEngine
from experiments.run.presets import EngineSection, Preset
from experiments.run.progress import RowTail, polled
from server_app.hypernet.network import Hypernetwork

HERE = "experiments.benchmarks.synthetic"
PRESETS = {"parallel": "cifar100-parallel", "sequential": "cifar100-sequential"}
HEADLINES = {"reference": "reference", "ray": "ray-parallel", "inprocess": "inprocess-parallel"}
"""The first keys of a measured part, and the runs that they are of."""
ROUNDS = 3
STEADY = 2
"""The round that is reported."""
KEYS = ("seconds_round", "seconds_server", "seconds_clients", "num_accepted")
"""What is reported of it, of its line in metrics.jsonl."""


@dataclass(frozen=True)
class Workload:
    """What a full round trains: clients, their data and a scratch folder."""

    num_clients: int
    data_dir: str
    folder: Path
    quick: bool = False

    def config(self, name: str, schedule: str = "parallel", **settings: Any) -> RunConfig:
        """Return the config of one measured run: a preset's, and `settings` with underscores."""
        preset = Preset.load(PRESETS[schedule]).with_engine({"num-clients": self.num_clients})
        flat: dict[str, Any] = {
            "rounds": ROUNDS,
            "min-client-examples": 4,
            "min-clients": self.num_clients,
            "checkpoint-every": ROUNDS,
            "data-dir": self.data_dir,
            "cache-dir": str(self.folder / "cache"),
            "output-dir": str(self.folder / name),
            "device": "cpu",
        }
        if not self.data_dir:
            pictures = f"{HERE}:{'handful_' if self.quick else ''}pictures"
            flat |= {"dataset": pictures, "partition": "iid"}
        if self.quick:
            flat |= {"hidden-dim": 8, "embed-dim": 8}
        flat |= {key.replace("_", "-"): value for key, value in settings.items()}
        return preset.with_config(flat).config

    def idle(self, name: str, **settings: Any) -> RunConfig:
        """Return the config of clients that do nothing but exchange vectors."""
        dataset = f"{HERE}:{'handful' if self.quick else 'few'}_pictures"
        idle = {"models": f"{HERE}:idle_model", "dataset": dataset, "partition": "iid"}
        return self.config(name, **{**idle, "data_dir": "", "batch_size": 1024, **settings})


def round_part(work: Workload) -> Row:
    """Measure a full round by engine and schedule, and the clear sequential implementation.

    The latter comes first: the in-process engine tunes this process's memory allocator. Where there
    is a GPU, the rows with "gpu" use it for clients and server, and the others the CPU alone.
    """
    rows = {"reference": attempt(reference, work)}
    if "cuda" in devices():
        gpu = {"device": "cuda", "server_device": "cuda"}
        rows["reference-gpu"] = attempt(reference, work, "cuda")
        rows["batched-gpu"] = attempt(batched, work, work.config("batched-gpu", **gpu))
        config = work.config("inprocess-gpu", **gpu)
        rows["inprocess-gpu"] = attempt(partial(inprocess, workers=1), work, config)
    for schedule in PRESETS:
        name = f"inprocess-{schedule}"
        rows[name] = attempt(inprocess, work, work.config(name, schedule))
        if not work.quick:
            name = f"ray-{schedule}"
            rows[name] = attempt(ray, work, work.config(name, schedule))
    for name, row in rows.items():
        against = rows["reference-gpu" if name.endswith("gpu") else "reference"]
        if "seconds_round" in row and "seconds_round" in against:
            row["ratio"] = against["seconds_round"] / row["seconds_round"]
    result: Row = {
        "num_clients": work.num_clients,
        "data": "cifar100" if work.data_dir else "synthetic",
        "rows": rows,
    }
    for name, run in HEADLINES.items():
        row = rows.get(run, {})
        result[f"{name}_seconds"] = row.get("seconds_round")
        result[f"{name}_cpu_seconds"] = row.get("cpu_seconds")
        result[f"{name}_ratio"] = row.get("ratio")
    return result


def runtime_part(work: Workload) -> Row:
    """Measure rounds of idle clients: what the engines cost by themselves, in seconds a round."""
    rows = {"inprocess": attempt(inprocess, work, work.idle("idle"))}
    if not work.quick:
        rows["ray"] = attempt(ray, work, work.idle("idle-ray"))
    for row in rows.values():
        if "skipped" not in row:
            row["idle_seconds"] = row["seconds_round"] - row["seconds_server"]
            row["idle_cpu_seconds"] = row["cpu_seconds"] - row["seconds_server"]
    return {"rows": rows}


def overhead(idle: Row, full: Row) -> Row:
    """Return the share of a full parallel round that an idle round's runtime makes up."""
    for engine in ("ray", "inprocess"):
        cost = idle["rows"].get(engine, {}).get("idle_seconds")
        total = full.get(f"{engine}_seconds")
        if cost is not None and total:
            return {"overhead_fraction": cost / total, "overhead_engine": engine}
    return {}


def inprocess(work: Workload, config: RunConfig, **options: Any) -> Row:
    """Run on the in-process engine; return the steady round's row."""
    folder = Path(config.run.output_dir)
    with by_round(folder, time.process_time) as used:
        grid = run_inprocess(config, simulated_nodes(work.num_clients), **options)
    return _steady(folder, used) | {"num_together": grid.num_together}


def batched(work: Workload, config: RunConfig) -> Row:
    """Run on the in-process engine, all clients of one architecture trained in one batched call.

    Raises RunError where some were trained one by one after all: that would be another figure.
    """
    row = inprocess(work, config, batched_clients=work.num_clients)
    expected = work.num_clients * ROUNDS
    if row["num_together"] < expected:
        raise RunError(
            f"{row['num_together']} of {expected} trainings were batched; the warnings above say "
            "why the others were not (memory of the device?)."
        )
    return row


def ray(work: Workload, config: RunConfig) -> Row:
    """Run on Flower's simulation engine; return the steady round's row."""
    section = EngineSection(name="ray", num_clients=work.num_clients)
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with RayEngine(section, log=folder / "run.log", extra_env=environment) as engine:
        mark = engine.environment[processes.MARK]
        with by_round(folder, partial(processes.cpu_seconds, mark)) as used:
            engine.run(config)
    return _steady(folder, used)


def reference(work: Workload, device: str = "cpu") -> Row:
    """Run one round of the clear sequential implementation on the same partitions."""
    config = work.config("reference", "sequential")
    clients = {
        str(i): load_client_data(
            config.client, partition_id=i, seed=config.run.seed, device=torch.device("cpu")
        )
        for i in range(work.num_clients)
    }
    first = clients["0"]

    def build() -> nn.Module:
        sizes = {"in_channels": first.in_channels, "num_classes": first.num_classes}
        return build_model("cnn", **sizes).to(device)

    if device != "cpu":  # load the device's libraries before a clock starts
        pixels = first.train_images[:2].float().to(device)
        build()(pixels).sum().backward()
    hypernet = Hypernetwork(config.hypernet, seed=config.run.seed)
    for client_id in clients:
        hypernet.add_client(client_id, sum(p.numel() for p in build().parameters()))
    return reference_round(reference_hypernet(hypernet, device), clients, build, device)


@contextmanager
def by_round(
    folder: Path, probe: Callable[[], Any], *, every_s: float = 0.05
) -> Iterator[list[Any]]:
    """Fill a list with what `probe` returns at the start and whenever a round has ended."""
    found, tail = [probe()], RowTail(folder / "metrics.jsonl")

    def look() -> None:
        if rows := tail.new_rows():
            found.extend([probe()] * len(rows))

    with polled(look, every_s):
        yield found


def _steady(folder: Path, used: list[float]) -> Row:
    """Return the row of the round that is reported, with the CPU seconds that it took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[STEADY - 1])
    return {key: row[key] for key in KEYS} | {"cpu_seconds": used[STEADY] - used[STEADY - 1]}
