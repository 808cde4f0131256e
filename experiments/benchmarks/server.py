"""Part (a): generation and update of one round, batched against one client after the other.

Sequential: N times (generate one theta, vector-Jacobian product of one delta, clip, Adam).
Parallel: generate N, one product of N deltas, clip, Adam once; beside it the same with the
least-squares rule, which keeps no gradient and no moments of the heads, and with that rule while
trunk and embeddings are at rest, as in the presets with 50 clients. All by this project's server;
the clear reference (tests/reference: nn.Linear heads, autograd, torch's Adam over everything) goes
through the sequential rule as well. Each size and rule runs in a process of its own, for its peak
memory; at a CNN's size the rule at rest also takes turns with the sequential one in one process,
and that is the ratio held against the target. On a GPU, where there is one, rules run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import psutil
import torch
from torch import Tensor, nn

from common.config import HypernetSection, UpdateSection
from experiments.benchmarks.child import measure_in_child
from experiments.benchmarks.machine import Machine
from experiments.benchmarks.timing import Timing, peak_bytes, take_turns
from server_app.aggregation.adam import ClientUpdate, ServerUpdate
from server_app.hypernet.blocks import BLOCK_CLIENTS, blocks
from server_app.hypernet.groups import num_chunks
from server_app.hypernet.network import Hypernetwork

Rule = Literal["adam", "least-squares", "at-rest"]
OTHER_RULES: dict[str, Rule] = {"least_squares": "least-squares", "at_rest": "at-rest"}
SEQUENTIAL_SAMPLE = 5
"""Clients of the sequential rule that are timed; a step costs the same for every client."""


class Round:
    """A server with N clients of one size, and what it does in a round under a rule."""

    def __init__(self, num_clients: int, num_parameters: int, rule: Rule, device: str) -> None:
        spread = 0.002 if rule == "adam" else 1.0
        largest = max(12_000_000, num_parameters)
        section = HypernetSection(max_parameters=largest, embedding_std=spread)
        self.hypernet = Hypernetwork(section, seed=0, device=device)
        self.ids = [str(i) for i in range(num_clients)]
        for client_id in self.ids:
            self.hypernet.add_client(client_id, num_parameters)
        self._update = ServerUpdate(self.hypernet, update_section(rule), total_rounds=10)
        generator = torch.Generator().manual_seed(0)
        self.deltas = {
            c: torch.empty(num_parameters).normal_(0, 0.01, generator=generator) for c in self.ids
        }
        self.sample = self.ids[:SEQUENTIAL_SAMPLE]

    def sequential(self) -> None:
        """Serve some clients one after the other, a step for each."""
        for client_id in self.sample:
            self.hypernet.generate([client_id])
            self._update.step([ClientUpdate(client_id, self.deltas[client_id])], progress=0.0)

    def generate(self) -> None:
        """Generate for everybody."""
        for block in blocks(self.ids, self.hypernet.num_parameters):
            self.hypernet.generate(block)

    def step(self) -> None:
        """Take one step on everybody's delta."""
        self._update.step([ClientUpdate(c, self.deltas[c]) for c in self.ids], progress=0.0)


def measure(
    num_clients: int,
    num_parameters: int,
    repeats: int,
    *,
    rule: Rule = "adam",
    device: str = "cpu",
) -> dict[str, Any]:
    """Time a rule in this process; seconds are for a round of N clients.

    Under "adam" the sequential rule too; on the CPU, at a CNN's size, the clear reference and the
    rule at rest as well.
    """
    server = Round(num_clients, num_parameters, rule, device)
    variants = {"generate": server.generate, "step": server.step}
    variants |= {"sequential": server.sequential} if rule == "adam" else {}
    found = take_turns(variants, repeats)
    rounds = num_clients / len(server.sample)
    result = _parallel(found["generate"], found["step"]) | {
        "num_clients": num_clients,
        "num_parameters": num_parameters,
        "peak_bytes": peak_bytes(),
    }
    if device != "cpu":
        result["gpu_bytes"] = torch.cuda.max_memory_allocated()
    if rule == "adam":
        result |= _sequential(result, found["sequential"], rounds)
        if num_parameters < 1_000_000 and device == "cpu":
            first = server.sample[0]
            turn = reference_step(server.hypernet, first, server.deltas[first])
            result |= _reference(result, take_turns({"reference": turn}, 2)["reference"])
            result["in_turns"] = _in_turns(server, repeats, rounds)
    return result


def _in_turns(server: Round, repeats: int, rounds: float) -> dict[str, Any]:
    """Time the sequential rule and the rule at rest in turns: the ratio of one run."""
    some = next(iter(server.deltas.values()))
    rest = Round(len(server.ids), some.numel(), "at-rest", "cpu")
    variants = {"sequential": server.sequential, "generate": rest.generate, "step": rest.step}
    found = take_turns(variants, repeats)
    row = _parallel(found["generate"], found["step"])
    return row | _sequential(row, found["sequential"], rounds)


def _parallel(generate: Timing, step: Timing) -> dict[str, Any]:
    """Return the figures of a round in which everybody is served at once."""
    return {
        "generate_seconds": generate.best,
        "update_seconds": step.best,
        "parallel_seconds": generate.best + step.best,
        "parallel_cpu_seconds": generate.cpu + step.cpu,
    }


def update_section(rule: Rule) -> UpdateSection:
    """Return the settings of a rule."""
    if rule == "at-rest":
        return UpdateSection(server_rule="least-squares", server_lr=0.0, embedding_lr=0.0)
    return UpdateSection(server_rule=rule)


def _sequential(row: dict[str, Any], timing: Timing, rounds: float) -> dict[str, Any]:
    """Return the figures of the sequential rule, `rounds` of which make a round of all clients."""
    return {
        "sequential_seconds": timing.best * rounds,
        "sequential_cpu_seconds": timing.cpu * rounds,
        "ratio": timing.best * rounds / row["parallel_seconds"],
        "cpu_ratio": timing.cpu * rounds / row["parallel_cpu_seconds"],
    }


def _reference(row: dict[str, Any], turn: Timing) -> dict[str, Any]:
    """Return the figures of the clear reference, of which one client's turn was timed."""
    return {
        "reference_seconds": turn.best * row["num_clients"],
        "reference_cpu_seconds": turn.cpu * row["num_clients"],
        "reference_ratio": turn.best * row["num_clients"] / row["parallel_seconds"],
    }


def reference_step(hypernet: Hypernetwork, client_id: str, delta: Tensor) -> Callable[[], None]:
    """Return one client's turn in the clear reference: generate, backward, clip, Adam."""
    from experiments.benchmarks.clear import reference_hypernet

    clear = reference_hypernet(hypernet)

    def turn() -> None:
        clear.adam.zero_grad(set_to_none=True)
        (clear.theta(client_id) @ delta).backward()
        groups = clear.adam.param_groups
        touched = [p for group in groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(touched, clear.hyper.server_clip)
        clear.adam.step()

    return turn


def least_bytes(num_clients: int, num_parameters: int, rule: Rule = "adam") -> int:
    """Estimate the memory of one size: phi, with gradient and moments under Adam, and deltas."""
    s = HypernetSection()
    heads = num_chunks(num_parameters, s.chunk_size) * s.chunk_size * (s.hidden_dim + 1)
    vectors = num_clients + min(num_clients, BLOCK_CLIENTS)
    if rule == "at-rest" and num_clients <= s.hidden_dim:
        vectors += 3 * num_clients  # theta before and after a step, and what the heads are owed
    return (16 if rule == "adam" else 4) * heads + 4 * num_parameters * vectors


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
    """Measure every (N, K) by both rules; what cannot fit into the free memory is said to be so."""
    rows = []
    for num_clients, num_parameters in sizes:
        row = _in_own_process(num_clients, num_parameters, repeats, rule="adam")
        if "skipped" not in row:
            row["bounds"] = bounds(row, machine)
        for name, rule in OTHER_RULES.items():
            row[name] = _in_own_process(num_clients, num_parameters, repeats, rule=rule)
            row[name] |= ratios(row, row[name])
        if torch.cuda.is_available():
            row["cuda"] = _on_gpu(num_clients, num_parameters, repeats)
        rows.append(row)
    return rows


def _on_gpu(num_clients: int, num_parameters: int, repeats: int) -> dict[str, Any]:
    """Measure the sequential rule, Adam for all, and the rule at rest on the GPU."""
    size = (num_clients, num_parameters, repeats)
    adam = _in_own_process(*size, rule="adam", device="cuda")
    rest = _in_own_process(*size, rule="at-rest", device="cuda")
    return {"adam": adam, "at_rest": rest | ratios(adam, rest)}


def ratios(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Hold another rule's parallel round against the sequential rule's, both measured now."""
    if "parallel_seconds" not in row or "parallel_seconds" not in other:
        return {}
    return {
        "ratio": row["sequential_seconds"] / other["parallel_seconds"],
        "cpu_ratio": row["sequential_cpu_seconds"] / other["parallel_cpu_seconds"],
    }


def _in_own_process(
    num_clients: int, num_parameters: int, repeats: int, *, rule: Rule, device: str = "cpu"
) -> dict[str, Any]:
    size: dict[str, Any] = {"num_clients": num_clients, "num_parameters": num_parameters}
    need = least_bytes(num_clients, num_parameters, rule)
    on_cpu = device == "cpu"
    free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info()[0]
    if need > 0.8 * free:
        return size | {"skipped": f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"}
    arguments = [str(num_clients), str(num_parameters), str(repeats), str(torch.get_num_threads())]
    return size | measure_in_child("experiments.benchmarks.server", [*arguments, rule, device])


def main() -> None:
    """Measure one size and print it as a line of JSON."""
    parser = argparse.ArgumentParser()
    for name in ("num_clients", "num_parameters", "repeats", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("rule", choices=get_args(Rule))
    parser.add_argument("device")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = (args.num_clients, args.num_parameters, args.repeats)
    print(json.dumps(measure(*size, rule=args.rule, device=args.device)))


if __name__ == "__main__":
    main()
