"""The tables that `mh-pfedhn bench` prints. Columns are keys of bench.json and say their units."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.benchmarks.measuring import Row

PARALLEL = ("parallel_cpu_seconds", "cpu_ratio")
TABLES: Mapping[str, tuple[str, Sequence[str]]] = {
    "server": (
        "server, CPU seconds of a round; ratios are against the sequential rule",
        (
            *("sequential_cpu_seconds", "reference_cpu_seconds", *PARALLEL, "peak_bytes"),
            *(f"least_squares.{key}" for key in PARALLEL),
            *(f"at_rest.{key}" for key in (*PARALLEL, "peak_bytes")),
        ),
    ),
    "server-gpu": (
        "server on the GPU, seconds of a round",
        (
            "adam.sequential_seconds",
            *(f"adam.{key}" for key in ("parallel_seconds", "ratio", "gpu_bytes")),
            *(f"at_rest.{key}" for key in ("parallel_seconds", "ratio", "gpu_bytes")),
        ),
    ),
    "client": (
        "client, one step of 64",
        (
            *("step_seconds", "dataloader_step_seconds", "ratio", "batches_seconds"),
            *("dataloader_batches_seconds", "test_batch_seconds"),
            *("bounds.bounded_by", "bounds.distance"),
        ),
    ),
    "batched": (
        "clients trained in one batched call, one epoch",
        (
            *("num_clients", "steps", "one_by_one_seconds", "batched_seconds", "ratio"),
            "difference",
        ),
    ),
    "wire": ("wire, one delta", ("bytes", "encode_seconds", "decode_seconds", "bounds.distance")),
    "round": (
        "full round, CNN clients; ratios are against the reference",
        ("seconds_round", "ratio", "cpu_seconds", "seconds_server", "seconds_clients"),
    ),
    "runtime": (
        "runtime, idle clients; idle is less the server's work",
        ("seconds_round", "idle_seconds", "idle_cpu_seconds"),
    ),
    "memory": (
        "memory, all clients and the server in one process",
        ("num_clients", "peak_bytes", "limit_bytes"),
    ),
    "growth": (
        "growth, idle clients, CPU seconds of a round",
        ("num_clients", "num_rounds", "typical_seconds", "last_bytes", "last_by_third"),
    ),
    "worker": (
        "worker, three deployed sites, CNN on digits",
        ("round_seconds", "first_seconds", "share"),
    ),
    "straggler": (
        "straggler, one client ten times slower",
        ("equal_seconds", "slow_seconds", "growth"),
    ),
}


def print_tables(results: Row, console: Console) -> None:
    """Print what was measured, part by part."""
    machine = results["machine"]
    console.print(
        f"\n{machine['cpu']}, {machine['cores']} cores, {machine['threads']} torch threads, "
        f"{show('memory_bytes', machine['memory_bytes'])}, GPU {machine['gpu']} (torch for CUDA "
        f"{machine['cuda']}), load {machine['load']:.1f}; measured peaks "
        f"{machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.1f} GB/s",
        highlight=False,
        soft_wrap=True,
    )
    for part, (title, keys) in TABLES.items():
        rows = rows_of(part, results)
        if rows:
            console.print(_table(title, keys, rows))
    if share := results.get("runtime", {}).get("overhead_fraction"):
        engine = results["runtime"]["overhead_engine"]
        console.print(f"an idle round on {engine} is {100 * share:.1f} % of a full one")


def rows_of(part: str, results: Row) -> dict[str, Row]:
    """Return the named rows of a part's table; none where it was not measured."""
    found = results.get(part.partition("-")[0], {})
    if part.startswith("server"):
        sizes = {f"{r['num_clients']} x {r['num_parameters']:,}": r for r in found.get("sizes", [])}
        if part == "server":
            return sizes
        return {name: row["cuda"] for name, row in sizes.items() if "cuda" in row}
    if part == "memory" or "skipped" in found:
        return {part: found} if found else {}
    inner = {"client": "models", "round": "runs", "runtime": "engines"}
    rows = found.get(inner[part], {}) if part in inner else found
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


def show(key: str, value: Any) -> str:
    """Write a figure in the unit that the name of its key gives away."""
    if value is None:
        return "-"
    if "seconds" in key:
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"
    if key.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.2f} MiB"
    if key.endswith(("ratio", "distance")):
        return f"{value:.1f}x"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _table(title: str, keys: Sequence[str], rows: Mapping[str, Row]) -> Table:
    table = Table("", title=title, title_justify="left")
    for key in keys:
        header = re.sub("_?(seconds|bytes)_?", "", key) or key
        table.add_column(header.replace(".", ": ").replace("_", " "), justify="right")
    for name, row in rows.items():
        if "skipped" in row:
            table.add_row(f"{name}: {escape(str(row['skipped'])[:60])}")
        else:
            table.add_row(name, *(show(key, _find(row, key)) for key in keys))
    return table


def _find(row: Any, key: str) -> Any:
    for part in key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row
