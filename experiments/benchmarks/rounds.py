"""Parts (c) and (e): whole rounds of the real apps, by engine and schedule, and their overhead.

The first round of a run pays for start-up (processes, imports, decoding) and the last one for the
final test of every client; the second of three is reported, in wall seconds and in CPU seconds of
all processes: those hold on a machine that others use too.
Overhead is measured with clients that exchange a CNN's parameters but have nothing to compute.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
import time
import traceback
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
from experiments.run.engines import processes
from experiments.run.engines.inprocess import run_inprocess
from server_app.hypernet.network import Hypernetwork

HERE = "experiments.benchmarks.synthetic"
ROUNDS = 3
STEADY = 2
"""The round that is reported."""


@dataclass(frozen=True)
class Workload:
    """What a full round trains: clients, their data and a scratch folder."""

    num_clients: int
    data_dir: str
    folder: Path
    quick: bool = False

    def config(self, name: str, **settings: Any) -> RunConfig:
        """Return the run config of one measured run; `settings` have underscores."""
        real = {"dataset": "cifar100", "data-dir": self.data_dir, "partition": "pathological"}
        made = {"dataset": f"{HERE}:{'handful_' * self.quick}pictures", "partition": "iid"}
        flat: dict[str, Any] = {
            "method": "mh-pfedhn",
            "models": "cnn",
            "rounds": ROUNDS,
            "num-partitions": self.num_clients,
            "min-client-examples": 4,
            "min-clients": self.num_clients,
            "max-in-flight": 0,
            "buffer-size": 0,
            "checkpoint-every": ROUNDS,
            "cache-dir": str(self.folder / "cache"),
            "output-dir": str(self.folder / name),
            "device": "cpu",
            **(real if self.data_dir else made),
            **({"hidden-dim": 8, "embed-dim": 8} if self.quick else {}),
        }
        flat |= {key.replace("_", "-"): value for key, value in settings.items()}
        return RunConfig.parse(flat)


SCHEDULES: dict[str, dict[str, Any]] = {
    # as in the preset cifar100-parallel
    "parallel": {
        "max_in_flight": 0,
        "buffer_size": 0,
        "server_rule": "least-squares",
        "head_init": "shared",
        "embedding_std": 1.0,
        "shared_gain": 2.0,
        "server_lr": 0.0,
        "embedding_lr": 0.0,
        "evaluation": "fused",
    },
    # as published
    "sequential": {"max_in_flight": 1, "buffer_size": 1},
}


def inprocess(work: Workload, config: RunConfig, **options: Any) -> dict[str, float]:
    """Run on the in-process engine; return the steady round's row."""
    folder = Path(config.run.output_dir)
    with _quiet(), _cpu_by_round(folder, time.process_time) as cpu:
        together = run_inprocess(config, num_clients=work.num_clients, **options)
    return steady_row(folder) | cpu | {"num_together": together}


def batched(work: Workload, config: RunConfig) -> dict[str, float]:
    """Run on the in-process engine, all clients of one architecture trained in one batched call.

    Raises
    ------
    RunError
        Some were trained one by one after all: that would be another figure.
    """
    row = inprocess(work, config, batched_clients=work.num_clients)
    asked = work.num_clients * ROUNDS
    if row["num_together"] < asked:
        raise RunError(
            f"{row['num_together']:.0f} of {asked} trainings were batched; the warnings above say "
            "why the others were not (memory of the device?)."
        )
    return row


def ray(work: Workload, config: RunConfig) -> dict[str, float]:
    """Run on Flower's simulation engine; return the steady round's row."""
    engines = importlib.import_module("experiments.run.engines.ray")
    presets = importlib.import_module("experiments.run.presets")
    section = presets.EngineSection(name="ray", num_clients=work.num_clients)
    root = str(Path(__file__).resolve().parents[2])
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with engines.RayEngine(section, log=folder / "run.log", extra_env=environment) as engine:
        used = partial(processes.cpu_seconds, engine.environment[processes.MARK])
        with _cpu_by_round(folder, used) as cpu:
            engine.run(config)
    return steady_row(folder) | cpu


def steady_row(folder: Path) -> dict[str, float]:
    """Return the row of the round that is reported."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    row: dict[str, float] = json.loads(lines[STEADY - 1])
    return row


def reference(work: Workload, device: str = "cpu") -> dict[str, float]:
    """Run one round of the clear sequential implementation on the same partitions."""
    config = work.config("reference")
    clients = {
        str(i): load_client_data(
            config.client, partition_id=i, seed=config.run.seed, device=torch.device("cpu")
        )
        for i in range(work.num_clients)
    }
    first = clients["0"]
    if device != "cpu":
        _warm_up(device)
    build = partial(_build_on, device, in_channels=first.in_channels, num_classes=first.num_classes)
    hypernet = Hypernetwork(config.hypernet, seed=config.run.seed)
    size = sum(p.numel() for p in build().parameters())
    for client_id in clients:
        hypernet.add_client(client_id, size)
    return reference_round(reference_hypernet(hypernet, device), clients, build, device)


def _warm_up(device: str) -> None:
    """Load the device's libraries before a clock starts: one convolution and product each way."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(4)).to(device)
    layer(torch.ones(2, 3, 8, 8, device=device)).sum().backward()
    torch.cuda.synchronize()


def _build_on(device: str, *, in_channels: int, num_classes: int) -> nn.Module:
    return build_model("cnn", in_channels=in_channels, num_classes=num_classes).to(device)


def idle_config(work: Workload, name: str) -> RunConfig:
    """Return the config of clients that do nothing but exchange vectors."""
    dataset = f"{HERE}:{'handful' if work.quick else 'few'}_pictures"
    settings = {"models": f"{HERE}:idle_model", "dataset": dataset, "data_dir": ""}
    settings |= SCHEDULES["parallel"]
    return work.config(name, partition="iid", batch_size=1024, **settings)


def attempt(measure: Any, *arguments: Any) -> dict[str, Any]:
    """Run a measurement; one that fails is reported as such, the others go on."""
    started = time.monotonic()
    try:
        row: dict[str, Any] = dict(measure(*arguments))
    except Exception as error:  # the bench's edge: an engine may be absent or not start here
        row = {
            "skipped": f"{type(error).__name__}: {str(error)[:300]}",
            "failed": True,
            "traceback": traceback.format_exc()[-4000:],
        }
    return row | {"seconds_measuring": time.monotonic() - started}


@contextmanager
def _cpu_by_round(folder: Path, used: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Fill in `cpu_seconds` of the steady round: used between two lines of metrics.jsonl."""
    found: dict[str, float] = {}
    seen, stop = [0.0], threading.Event()
    metrics = folder / "metrics.jsonl"

    def watch() -> None:
        while not stop.wait(0.05):
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if lines > len(seen) - 1:
                seen.append(used())
                if len(seen) == STEADY + 1:
                    found["cpu_seconds"] = seen[-1] - seen[-2]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep log lines of the runs out of the table."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
