"""Measure what the warm worker saves: `python -m experiments.bench.worker`.

A real SuperLink and three real SuperNodes on loopback train the published CNN on digits: without
the warm worker, with it, and with it as `mh-pfedhn join` starts it (`lean_clientapp`). Everything
else is the same. Times of rounds are what the server wrote into metrics.jsonl. The first round is
shown apart: it contains the registration and, with the worker, its start.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table

from common.config import RunConfig
from experiments.engines.loopback import Loopback

Mode = Literal["off", "on", "join"]


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


@dataclass(frozen=True)
class Timing:
    """Seconds per round of one run, as the server measured them."""

    rounds: list[float]
    accuracy: float

    @property
    def typical(self) -> float:
        """Median over all rounds but the first."""
        return median(self.rounds[1:])


def measure(bench: Bench, mode: Mode, folder: Path) -> Timing:
    """Run the deployment once, with the worker `off`, `on`, or `on` as `join` starts it."""
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
                    "warm-worker": "off" if mode == "off" else "on",
                },
                lean=mode == "join",
            )
        loopback.run(config, timeout_s=1800.0)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return Timing([row["seconds_round"] for row in rows], rows[-1]["accuracy_micro"])


def main() -> None:
    """Measure both ways and print the figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--evaluation", choices=("separate", "fused"), default="separate")
    args = parser.parse_args()
    bench = Bench(max(2, args.rounds), args.sites, args.model, args.evaluation)
    console = Console(width=110)
    found: dict[Mode, Timing] = {}
    with tempfile.TemporaryDirectory(prefix="mh-pfedhn-bench-") as folder:
        for mode in get_args(Mode):
            before = os.getloadavg()[0]
            found[mode] = measure(bench, mode, Path(folder) / mode)
            console.print(f"warm worker {mode}: done; load before {before:.1f}", highlight=False)
    table = Table(title=f"{bench.sites} sites, {bench.model}, digits, evaluation {args.evaluation}")
    for column in ("warm worker", "round, median (s)", "first round (s)", "rounds (s)", "accuracy"):
        table.add_column(column)
    for mode, timing in found.items():
        rounds = " ".join(f"{s:.1f}" for s in timing.rounds)
        table.add_row(
            mode,
            f"{timing.typical:.2f}",
            f"{timing.rounds[0]:.1f}",
            rounds,
            f"{timing.accuracy:.3f}",
        )
    console.print(table)
    compared: tuple[Mode, Mode] = ("on", "join")
    for mode in compared:
        ratio = found[mode].typical / found["off"].typical
        console.print(f"{mode} / off: {ratio:.2f}", highlight=False)
    console.print(
        f"{os.cpu_count()} CPUs, load average now {os.getloadavg()[0]:.1f}", highlight=False
    )


if __name__ == "__main__":
    main()
