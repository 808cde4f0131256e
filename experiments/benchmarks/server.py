"""Server: generation and update of one round, all clients at once against one after the other.

Sequential: N times (generate one theta, vector-Jacobian product of one delta, clip, Adam).
Parallel: generate N, one product of N deltas, one step; under Adam, and under the kernel rule. The
clear reference (tests/reference: nn.Linear heads, autograd, torch's Adam over everything) goes
through the sequential rule as well. Each size and rule runs in a process of its own, for its peak
memory; at a CNN's size every rule takes turns with the sequential one there. Where memory does
not hold the deltas of N clients, the kernel rule takes `COHORT` at a time, and one cohort is timed.
"""

from __future__ import annotations

from typing import Literal, get_args

import psutil
import torch

from common.config import RunConfig
from experiments.benchmarks.clear import reference_hypernet, server_step
from experiments.benchmarks.measuring import (
    Machine,
    Row,
    devices,
    in_own_process,
    peak_bytes,
    take_turns,
)
from experiments.benchmarks.synthetic import IDLE_PARAMETERS
from experiments.run.presets import Preset
from server_app.aggregation import make_network, make_rule
from server_app.hypernet.groups import Update, num_chunks
from server_app.hypernet.kernel import DISK_CLIENTS, MEMORY_SHARE, KernelNetwork
from server_app.hypernet.network import Hypernetwork

Rule = Literal["adam", "kernel"]
TARGET = (50, IDLE_PARAMETERS)
SIZES = [(n, k) for k in (IDLE_PARAMETERS, 2_000_000, 11_000_000) for n in (10, 50, 200, 1000)]
QUICK_SIZE = (4, 6_000)
SAMPLE = 5
"""Clients of the sequential rule that are timed; a step costs the same for every client."""
COHORT = 50


def settings(rule: Rule, num_parameters: int) -> RunConfig:
    """Return a run config with a rule, as the presets have it."""
    preset = "cifar100-sequential" if rule == "adam" else "cifar100-parallel"
    overrides: dict[str, float] = {"max-parameters": max(12_000_000, num_parameters)}
    return Preset.load(preset).config.with_overrides(overrides)


def server_part(machine: Machine, *, quick: bool, repeats: int) -> Row:
    """Measure every (N, K) by all rules; the kernel rule's for 50 CNN clients come first."""
    rows: dict[str, Row] = {}
    for n, k in [QUICK_SIZE] if quick else SIZES:
        for device in devices():
            found = {rule: _in_own_process(n, k, repeats, rule, device) for rule in get_args(Rule)}
            for rule, row in found.items():
                sequential = row if "sequential_seconds" in row else found["adam"]
                bound = kernel_bound(machine, n, k, row) if rule == "kernel" else {}
                rows[_name(n, k, rule, device)] = row | ratios(sequential, row) | bound
    return rows[_name(*(QUICK_SIZE if quick else TARGET), "kernel", "cpu")] | {"rows": rows}


def _name(num_clients: int, num_parameters: int, rule: Rule, device: str) -> str:
    return f"{num_clients} x {num_parameters:,} {rule} {device}"


def _in_own_process(n: int, num_parameters: int, repeats: int, rule: Rule, device: str) -> Row:
    cpu = device == "cpu"
    free = psutil.virtual_memory().available if cpu else torch.cuda.mem_get_info()[0]
    cohort = n
    if least_bytes(n, num_parameters, rule, n) > 0.8 * free and rule == "kernel":
        cohort = min(n, COHORT)
    need = least_bytes(n, num_parameters, rule, cohort)
    if rule == "kernel" and cpu:  # the rest lies on a disk
        need = min(need, int(MEMORY_SHARE * free) + least_bytes(0, num_parameters, rule, cohort))
    if need > 0.8 * free:
        return {"skipped": f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"}
    arguments = (n, num_parameters, repeats, rule, device, cohort)
    return in_own_process(measure, *arguments, threads=torch.get_num_threads())


def least_bytes(num_clients: int, num_parameters: int, rule: Rule, cohort: int) -> int:
    """Estimate the memory of one size: what is learned, with Adam's moments, and deltas."""
    section = settings(rule, num_parameters).hypernet
    chunks = num_chunks(num_parameters, section.chunk_size)
    vectors = cohort + min(cohort, DISK_CLIENTS)
    learned = 4 * (section.hidden_dim + 1) if rule == "adam" else num_clients + 3
    return 4 * (chunks * section.chunk_size * learned + num_parameters * vectors)


def kernel_bound(machine: Machine, num_clients: int, num_parameters: int, row: Row) -> Row:
    """Say what bounds a round of the kernel rule on the CPU, and how far it is from there.

    Per cohort of n: the product of K (n, N) and the clients' vectors, which are read once; thetas
    are written, deltas read, and the vectors of the n read and written once.
    """
    if "gpu_bytes" in row or "parallel_seconds" not in row:
        return {}
    n, cohorts = row["cohort"], num_clients / row["cohort"]
    return machine.bound(
        row["parallel_seconds"],
        flops=cohorts * 2 * n * num_clients * num_parameters,
        traffic=cohorts * 4 * num_parameters * (num_clients + 4 * n),
    )


class Server:
    """A server with N clients of one size, and what it does in a round under a rule.

    With a cohort smaller than N all clients have learned something already.
    """

    def __init__(
        self, num_clients: int, num_parameters: int, rule: Rule, device: str, cohort: int
    ) -> None:
        config = settings(rule, num_parameters)
        self.hypernet = make_network(rule, config.hypernet, seed=0, device=device)
        self._rule = make_rule(self.hypernet, config.update, total_rounds=10)
        generator = torch.Generator().manual_seed(0)
        self.updates: list[Update] = []
        for client_id in map(str, range(num_clients)):
            self.hypernet.add_client(client_id, num_parameters)
            if len(self.updates) < cohort:
                delta = torch.empty(num_parameters).normal_(0, 0.01, generator=generator)
                self.updates.append(Update(client_id, delta))
            if cohort < num_clients and isinstance(self.hypernet, KernelNetwork):
                delta = self.updates[int(client_id) % len(self.updates)].delta
                self.hypernet.personal[client_id].copy_(delta)
                self.hypernet.embeddings[client_id].normal_(generator=generator)

    def sequential(self) -> None:
        """Serve some clients one after the other, a step for each."""
        for update in self.updates[:SAMPLE]:
            self.hypernet.generate([update.client_id])
            self._rule.step([update], progress=0.0)

    def parallel(self) -> None:
        """Generate for everybody, and take one step on everybody's delta."""
        ids = [update.client_id for update in self.updates]
        for block in self.hypernet.blocks(ids):
            self.hypernet.generate(block)
        self._rule.step(self.updates, progress=0.0)


def measure(
    num_clients: int, num_parameters: int, repeats: int, rule: Rule, device: str, cohort: int
) -> Row:
    """Time a rule in this process; seconds (wall and CPU) are for a round of N clients.

    Under "adam" the sequential rule too; on the CPU, at a CNN's size, it is timed beside every
    rule, and the clear reference beside "adam".
    """
    size = (num_clients, num_parameters)
    server = Server(*size, rule, device, cohort)
    if cohort == num_clients:
        server.parallel()  # now all have learned something
    row: Row = {"cohort": cohort, "peak_bytes": peak_bytes()}
    if device != "cpu":
        row["gpu_bytes"] = torch.cuda.max_memory_allocated()
    small = device == "cpu" and num_parameters < 1_000_000
    variants, times = {"parallel": server.parallel}, {"parallel": num_clients / cohort}
    if small or rule == "adam":
        adam = server if rule == "adam" else Server(*size, "adam", device, num_clients)
        variants["sequential"] = adam.sequential
        times["sequential"] = num_clients / min(num_clients, SAMPLE)
    if small and rule == "adam":
        assert isinstance(server.hypernet, Hypernetwork)
        clear, first = reference_hypernet(server.hypernet), server.updates[0]
        variants["reference"] = lambda: server_step(clear, first.client_id, first.delta)
        times["reference"] = num_clients
    for name, timing in take_turns(variants, repeats).items():
        row[f"{name}_seconds"] = timing.best * times[name]
        row[f"{name}_cpu_seconds"] = timing.cpu * times[name]
    return row


def ratios(sequential: Row, parallel: Row) -> Row:
    """Say how many times as fast as a sequential round a parallel one is."""
    if "sequential_seconds" not in sequential or "parallel_seconds" not in parallel:
        return {}
    return {
        "ratio": sequential["sequential_seconds"] / parallel["parallel_seconds"],
        "cpu_ratio": sequential["sequential_cpu_seconds"] / parallel["parallel_cpu_seconds"],
    }
