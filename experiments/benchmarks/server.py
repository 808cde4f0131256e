"""Server: generation and update of one round, all clients at once against one after the other.

Sequential: N times (generate one theta, vector-Jacobian product of one delta, clip, Adam).
Parallel: generate N, one product of N deltas, one step; under Adam, under least squares, and under
least squares with trunk and embeddings at rest. The clear reference (tests/reference: nn.Linear
heads, autograd, torch's Adam over everything) goes through the sequential rule as well. Each size
and rule runs in a process of its own, for its peak memory; at a CNN's size the rule at rest also
takes turns with the sequential one in one process, which gives the ratio of `bench.json`.
"""

from __future__ import annotations

from typing import Literal

import psutil
import torch

from common.config import RunConfig
from experiments.benchmarks.clear import reference_hypernet, server_step
from experiments.benchmarks.measuring import Row, Timing, in_own_process, peak_bytes, take_turns
from experiments.benchmarks.synthetic import IDLE_PARAMETERS
from experiments.run.presets import Preset
from server_app.aggregation import make_rule
from server_app.aggregation.base import Update
from server_app.hypernet.groups import BLOCK_CLIENTS, blocks, num_chunks
from server_app.hypernet.network import Hypernetwork

Rule = Literal["adam", "least-squares", "at-rest"]
OTHER_RULES: dict[str, Rule] = {"least_squares": "least-squares", "at_rest": "at-rest"}
SIZES = [(n, k) for k in (IDLE_PARAMETERS, 2_000_000, 11_000_000) for n in (10, 50, 200, 1000)]
TARGET = (50, IDLE_PARAMETERS)
QUICK_SIZES = [(4, 6_000)]
PARALLEL_KEYS = ("parallel_seconds", "ratio", "cpu_ratio")
SEQUENTIAL_KEYS = ("sequential_seconds", "reference_seconds")
SEQUENTIAL_SAMPLE = 5
"""Clients of the sequential rule that are timed; a step costs the same for every client."""


def settings(rule: Rule, num_parameters: int) -> RunConfig:
    """Return a run config with a rule, as the presets have it."""
    preset = "cifar100-sequential" if rule == "adam" else "cifar100-parallel"
    overrides: dict[str, float] = {"max-parameters": max(12_000_000, num_parameters)}
    if rule == "least-squares":
        overrides |= {"server-lr": 2e-4, "embedding-lr": 2e-4}
    return Preset.load(preset).config.with_overrides(overrides)


def server_part(*, quick: bool, repeats: int) -> Row:
    """Measure every (N, K) by all rules; the figures of 50 CNN clients come first."""
    rows = [_all_rules(n, k, repeats) for n, k in (QUICK_SIZES if quick else SIZES)]
    first = next((r for r in rows if (r["num_clients"], r["num_parameters"]) == TARGET), rows[0])
    found: Row = {k: first[k] for k in SEQUENTIAL_KEYS if k in first}
    rest = first.get("in_turns", first["at_rest"])
    rules = {"": rest, "adam_": first, "least_squares_": first["least_squares"]}
    for prefix, row in rules.items():
        found |= {prefix + key: row[key] for key in PARALLEL_KEYS if key in row}
    return found | {"sizes": rows}


def _all_rules(num_clients: int, num_parameters: int, repeats: int) -> Row:
    size = (num_clients, num_parameters, repeats)
    row = _in_own_process(*size, "adam", "cpu")
    for name, rule in OTHER_RULES.items():
        row[name] = _in_own_process(*size, rule, "cpu")
        row[name] |= ratios(row, row[name])
    if torch.cuda.is_available():
        adam, rest = (_in_own_process(*size, rule, "cuda") for rule in ("adam", "at-rest"))
        row["cuda"] = {"adam": adam, "at_rest": rest | ratios(adam, rest)}
    return row


def _in_own_process(n: int, num_parameters: int, repeats: int, rule: Rule, device: str) -> Row:
    need = least_bytes(n, num_parameters, rule)
    cpu = device == "cpu"
    free = psutil.virtual_memory().available if cpu else torch.cuda.mem_get_info()[0]
    row: Row = {"num_clients": n, "num_parameters": num_parameters}
    if need > 0.8 * free:
        return row | {"skipped": f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"}
    arguments = (n, num_parameters, repeats, rule, device)
    return row | in_own_process(measure, *arguments, threads=torch.get_num_threads())


def least_bytes(num_clients: int, num_parameters: int, rule: Rule = "adam") -> int:
    """Estimate the memory of one size: phi, with gradient and moments under Adam, and deltas."""
    section = settings(rule, num_parameters).hypernet
    chunks = num_chunks(num_parameters, section.chunk_size)
    heads = chunks * section.chunk_size * (section.hidden_dim + 1)
    vectors = num_clients + min(num_clients, BLOCK_CLIENTS)
    return (16 if rule == "adam" else 4) * heads + 4 * num_parameters * vectors


class Server:
    """A server with N clients of one size, and what it does in a round under a rule."""

    def __init__(self, num_clients: int, num_parameters: int, rule: Rule, device: str) -> None:
        config = settings(rule, num_parameters)
        self.hypernet = Hypernetwork(config.hypernet, seed=0, device=device)
        self.ids = [str(i) for i in range(num_clients)]
        for client_id in self.ids:
            self.hypernet.add_client(client_id, num_parameters)
        self._rule = make_rule(self.hypernet, config.update, total_rounds=10)
        generator = torch.Generator().manual_seed(0)
        self.deltas = {
            c: torch.empty(num_parameters).normal_(0, 0.01, generator=generator) for c in self.ids
        }
        self.sample = self.ids[:SEQUENTIAL_SAMPLE]

    def sequential(self) -> None:
        """Serve some clients one after the other, a step for each."""
        for client_id in self.sample:
            self.hypernet.generate([client_id])
            self._rule.step([Update(client_id, self.deltas[client_id])], progress=0.0)

    def generate(self) -> None:
        """Generate for everybody."""
        for block in blocks(self.ids, self.hypernet.num_parameters):
            self.hypernet.generate(block)

    def step(self) -> None:
        """Take one step on everybody's delta."""
        self._rule.step([Update(c, self.deltas[c]) for c in self.ids], progress=0.0)


def measure(num_clients: int, num_parameters: int, repeats: int, rule: Rule, device: str) -> Row:
    """Time a rule in this process; seconds are for a round of N clients.

    Under "adam" the sequential rule too; on the CPU, at a CNN's size, the clear reference and the
    rule at rest as well.
    """
    server = Server(num_clients, num_parameters, rule, device)
    variants = {"generate": server.generate, "step": server.step}
    variants |= {"sequential": server.sequential} if rule == "adam" else {}
    row = _figures(take_turns(variants, repeats), num_clients) | {"peak_bytes": peak_bytes()}
    if device != "cpu":
        row["gpu_bytes"] = torch.cuda.max_memory_allocated()
    elif rule == "adam" and num_parameters < 1_000_000:
        first, clear = server.sample[0], reference_hypernet(server.hypernet)
        turn = {"reference": lambda: server_step(clear, first, server.deltas[first])}
        timing = take_turns(turn, 2)["reference"]
        row["reference_seconds"] = timing.best * num_clients
        row["reference_cpu_seconds"] = timing.cpu * num_clients
        rest = Server(num_clients, num_parameters, "at-rest", device)
        variants |= {"generate": rest.generate, "step": rest.step}
        row["in_turns"] = _figures(take_turns(variants, repeats), num_clients)
    return row


def _figures(found: dict[str, Timing], num_clients: int) -> Row:
    """Return the seconds of a parallel round and, where it was timed, of a sequential one."""
    generate, step = found["generate"], found["step"]
    row: Row = {
        "generate_seconds": generate.best,
        "update_seconds": step.best,
        "parallel_seconds": generate.best + step.best,
        "parallel_cpu_seconds": generate.cpu + step.cpu,
    }
    if "sequential" in found:
        rounds = num_clients / min(num_clients, SEQUENTIAL_SAMPLE)
        row["sequential_seconds"] = found["sequential"].best * rounds
        row["sequential_cpu_seconds"] = found["sequential"].cpu * rounds
    return row | ratios(row, row)


def ratios(sequential: Row, parallel: Row) -> Row:
    """Say how many times as fast as a sequential round a parallel one is."""
    if "sequential_seconds" not in sequential or "parallel_seconds" not in parallel:
        return {}
    return {
        "ratio": sequential["sequential_seconds"] / parallel["parallel_seconds"],
        "cpu_ratio": sequential["sequential_cpu_seconds"] / parallel["parallel_cpu_seconds"],
    }
