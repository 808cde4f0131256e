"""Part (a): generation and update of one round, batched against one client after the other.

Sequential: N times (generate one theta, vector-Jacobian product of one delta, clip, Adam).
Parallel: generate N, one product of N deltas, clip, Adam once. Both by this project's server; the
clear reference (tests/reference: nn.Linear heads, autograd, torch's Adam over everything) goes
through the sequential rule as well. Each size runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from common.config import HypernetSection, UpdateSection
from experiments.bench.machine import Machine
from experiments.bench.timing import peak_bytes, take_turns
from server_app.grouping import num_chunks
from server_app.hypernet import Hypernetwork
from server_app.update import ClientUpdate, ServerUpdate

GENERATE_BLOCK = 64
SEQUENTIAL_SAMPLE = 5
"""Clients of the sequential rule that are timed; a step costs the same for every client."""


def measure(num_clients: int, num_parameters: int, repeats: int) -> dict[str, Any]:
    """Time both rules and the reference in this process; seconds are for a round of N clients."""
    section = HypernetSection(max_parameters=max(12_000_000, num_parameters))
    hypernet = Hypernetwork(section, seed=0)
    ids = [str(i) for i in range(num_clients)]
    for client_id in ids:
        hypernet.add_client(client_id, num_parameters)
    update = ServerUpdate(hypernet, UpdateSection(), total_rounds=10)
    generator = torch.Generator().manual_seed(0)
    deltas = {c: torch.empty(num_parameters).normal_(0, 0.01, generator=generator) for c in ids}
    sample = ids[:SEQUENTIAL_SAMPLE]

    def sequential() -> None:
        for client_id in sample:
            hypernet.generate([client_id])
            update.step([ClientUpdate(client_id, deltas[client_id])], progress=0.0)

    def generate() -> None:
        for first in range(0, num_clients, GENERATE_BLOCK):
            hypernet.generate(ids[first : first + GENERATE_BLOCK])

    def step() -> None:
        update.step([ClientUpdate(c, deltas[c]) for c in ids], progress=0.0)

    found = take_turns({"sequential": sequential, "generate": generate, "step": step}, repeats)
    result = {
        "num_clients": num_clients,
        "num_parameters": num_parameters,
        "sequential_seconds": found["sequential"].best * num_clients / len(sample),
        "sequential_cpu_seconds": found["sequential"].cpu * num_clients / len(sample),
        "generate_seconds": found["generate"].best,
        "update_seconds": found["step"].best,
        "parallel_seconds": found["generate"].best + found["step"].best,
        "parallel_cpu_seconds": found["generate"].cpu + found["step"].cpu,
        "peak_bytes": peak_bytes(),
    }
    result["ratio"] = result["sequential_seconds"] / result["parallel_seconds"]
    if num_parameters < 1_000_000:
        step_one = reference_step(hypernet, sample[0], deltas[sample[0]])
        seconds = take_turns({"reference": step_one}, 2)["reference"].best * num_clients
        result["reference_seconds"] = seconds
        result["reference_ratio"] = seconds / result["parallel_seconds"]
    return result


def reference_step(hypernet: Hypernetwork, client_id: str, delta: Tensor) -> Callable[[], None]:
    """Return one client's turn in the clear reference: generate, backward, clip, Adam."""
    from experiments.bench.clear import reference_hypernet

    clear = reference_hypernet(hypernet)

    def turn() -> None:
        clear.adam.zero_grad(set_to_none=True)
        (clear.theta(client_id) @ delta).backward()
        groups = clear.adam.param_groups
        touched = [p for group in groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(touched, clear.hyper.server_clip)
        clear.adam.step()

    return turn


def least_bytes(num_clients: int, num_parameters: int) -> int:
    """Estimate the memory of one size: phi with gradient and moments, and the deltas."""
    s = HypernetSection()
    heads = num_chunks(num_parameters, s.chunk_size) * s.chunk_size * (s.hidden_dim + 1)
    return 16 * heads + 4 * num_parameters * (num_clients + min(num_clients, GENERATE_BLOCK))


def bounds(row: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Say what bounds the two rules for a row of results.

    Operations: three products of 2 N P H (generate, heads' gradient, features' gradient).
    Traffic of a step: the heads are read by two products and by Adam, which reads and writes both
    moments, reads the gradient and writes the heads; the gradient is written once: 40 bytes each.
    """
    s = HypernetSection()
    n, p = row["num_clients"], row["num_parameters"]
    flops = 6.0 * n * p * s.hidden_dim
    heads = num_chunks(p, s.chunk_size) * s.chunk_size * (s.hidden_dim + 1)
    return {
        "sequential": machine.bound(
            row["sequential_seconds"], flops=flops, traffic=n * 40.0 * heads
        ),
        "parallel": machine.bound(
            row["parallel_seconds"], flops=flops, traffic=40.0 * heads + 16.0 * n * p
        ),
    }


def server_table(
    sizes: Sequence[tuple[int, int]], machine: Machine, repeats: int
) -> list[dict[str, Any]]:
    """Measure every (N, K) in a fresh process; a size that cannot fit is said to be so."""
    rows = []
    for num_clients, num_parameters in sizes:
        need, free = least_bytes(num_clients, num_parameters), psutil.virtual_memory().available
        row: dict[str, Any] = {"num_clients": num_clients, "num_parameters": num_parameters}
        if need > 0.8 * free:
            row["skipped"] = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        else:
            row = _in_own_process(num_clients, num_parameters, repeats)
            if "skipped" not in row:
                row["bounds"] = bounds(row, machine)
        rows.append(row)
    return rows


def _in_own_process(num_clients: int, num_parameters: int, repeats: int) -> dict[str, Any]:
    arguments = [str(num_clients), str(num_parameters), str(repeats), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.server", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        return {
            "num_clients": num_clients,
            "num_parameters": num_parameters,
            "skipped": reason,
        }
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Measure one size and print it as a line of JSON."""
    parser = argparse.ArgumentParser()
    for name in ("num_clients", "num_parameters", "repeats", "threads"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.num_clients, args.num_parameters, args.repeats)))


if __name__ == "__main__":
    main()
