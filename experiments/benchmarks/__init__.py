"""`mh-pfedhn bench`: what each part costs, side by side in one run, and what bounds it."""

from __future__ import annotations

import argparse
from typing import Any

PARTS = ("server", "client", "batched", "wire", "round", "runtime", "memory", "growth")


def add_bench_parser(commands: Any) -> None:
    """Add the `bench` command to the sub-commands of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="measure server, client, wire and whole rounds on this machine"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--data-dir", metavar="DIR", help="CIFAR-100; else synthetic pictures")
    parser.add_argument("--clients", type=int, default=50, metavar="N", help="of a full round")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of short timings")
    parser.add_argument("--output-dir", metavar="DIR", default="bench", help="bench.json, pictures")
    parser.set_defaults(command=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit status."""
    from experiments.benchmarks.suite import run_suite  # imports torch: seconds

    return run_suite(args)
