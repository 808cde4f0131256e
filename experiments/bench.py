"""`mh-pfedhn bench`: what each part costs, side by side in one run. A wheel has no benchmarks."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from common.errors import ConfigError

USUAL = ("server", "client", "batched", "wire", "round", "runtime", "memory", "growth")
PARTS = (*USUAL, "worker", "straggler", "registered")


def add_bench_parser(commands: Any) -> None:
    """Add `bench` to the command line."""
    command = commands.add_parser("bench")
    command.add_argument("--quick", action="store_true", help="toy sizes: does it run at all?")
    command.add_argument("--parts", default=",".join(USUAL), help="some of " + ", ".join(PARTS))
    command.add_argument("--data-dir", metavar="DIR", help="CIFAR-100; else synthetic pictures")
    command.add_argument("--clients", type=int, default=50, metavar="N", help="of a full round")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="of short timings")
    command.add_argument(
        "--output-dir", metavar="DIR", default="bench", help="bench.json, pictures"
    )
    command.set_defaults(command=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Measure and return the exit status; raise ConfigError outside a checkout."""
    if find_spec("experiments.benchmarks") is None:
        raise ConfigError(
            "bench: benchmarks are not part of the installed package. Clone the repository and "
            "run `uv run mh-pfedhn bench` there."
        )
    from experiments.benchmarks.suite import run_suite  # imports torch: seconds

    return run_suite(args)
