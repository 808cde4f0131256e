"""Measure what the warm worker saves: `python -m experiments.benchmarks.worker`.

A real SuperLink and three real SuperNodes on loopback train the published CNN on digits: the
deployment that `mh-pfedhn join` makes with `warm-worker` off and on, and nothing else differs. The
two take turns, so that a busy machine hits both alike. Times of rounds are what the server wrote
into metrics.jsonl. The first round of a run is shown apart: it contains the registration and, with
the worker, its start.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table

from common.config import RunConfig
from experiments.run.engines.loopback import Loopback

Mode = Literal["off", "on"]


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    rounds: int
    sites: int
    model: str
    evaluation: str

    def config(self, folder: Path) -> RunConfig:
        """Return the run config: all sites at once, data prepared once for both ways."""
        return RunConfig.parse(
            {
                "method": "mh-pfedhn",
                "rounds": self.rounds,
                "evaluation": self.evaluation,
                "models": self.model,
                "dataset": "digits",
                "partition": "dirichlet",
                "dirichlet-alpha": 100.0,
                "num-partitions": self.sites,
                "output-dir": str(folder),
                "max-in-flight": 0,
                "buffer-size": 0,
                "min-clients": self.sites,
                "server-lr": 0.001,
                "embedding-lr": 0.001,
            }
        )


@dataclass
class Timing:
    """Seconds per round, as the server measured them, over all runs of one way."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def typical(self) -> float:
        """Median over all rounds but the first of each run."""
        return median(self.later)

    def read(self, metrics: Path) -> None:
        """Take the rounds of one run."""
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        seconds = [row["seconds_round"] for row in rows]
        self.first.append(seconds[0])
        self.later.extend(seconds[1:])
        self.accuracy = rows[-1]["accuracy_micro"]


def run_once(bench: Bench, mode: Mode, folder: Path) -> Path:
    """Run the deployment once; returns its metrics.jsonl."""
    config = bench.config(folder / "run")
    with Loopback(folder) as loopback:
        for i in range(bench.sites):
            loopback.start_node(
                f"site-{i}",
                {
                    "client-id": f"site-{i}",
                    "partition-id": i,
                    "num-partitions": bench.sites,
                    "state-dir": str(folder / "state"),
                    "warm-worker": mode,
                },
            )
        loopback.run(config, timeout_s=1800.0)
    return folder / "run" / "metrics.jsonl"


def main() -> None:
    """Measure all ways in turn and print the figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--evaluation", choices=("separate", "fused"), default="fused")
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=["off", "on"])
    args = parser.parse_args()
    bench = Bench(max(2, args.rounds), args.sites, args.model, args.evaluation)
    console = Console(width=110)
    found: dict[Mode, Timing] = {mode: Timing() for mode in args.modes}
    with tempfile.TemporaryDirectory(prefix="mh-pfedhn-bench-") as folder:
        for i in range(args.repeat):
            for mode, timing in found.items():
                before = os.getloadavg()[0]
                timing.read(run_once(bench, mode, Path(folder) / f"{mode}-{i}"))
                console.print(
                    f"{mode}: {timing.typical:.2f} s a round; load before {before:.1f}",
                    highlight=False,
                )
    console.print(_table(bench, found))
    if {"on", "off"} <= found.keys():
        ratio = found["on"].typical / found["off"].typical
        console.print(f"on / off: {ratio:.2f} (wanted: at most 0.5)", highlight=False)
    console.print(
        f"{os.cpu_count()} CPUs, of which this may use {len(os.sched_getaffinity(0))}; "
        f"load average now {os.getloadavg()[0]:.1f}",
        highlight=False,
    )


def _table(bench: Bench, found: dict[Mode, Timing]) -> Table:
    table = Table(
        title=f"{bench.sites} sites, {bench.model}, digits, evaluation {bench.evaluation}"
    )
    for column in (
        "warm worker",
        "round, median (s)",
        "first rounds (s)",
        "rounds (s)",
        "accuracy",
    ):
        table.add_column(column)
    for mode, timing in found.items():
        table.add_row(
            mode,
            f"{timing.typical:.2f}",
            " ".join(f"{s:.1f}" for s in timing.first),
            " ".join(f"{s:.1f}" for s in timing.later),
            f"{timing.accuracy:.3f}",
        )
    return table


if __name__ == "__main__":
    main()
