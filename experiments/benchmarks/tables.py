"""The tables that `mh-pfedhn bench` prints: every figure of bench.json, one row a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.benchmarks.measuring import Row

TITLES: Mapping[str, str] = {
    "server": "server, a round; ratios are against the sequential rule",
    "client": "client, one step of 64; the ratio is against a plain DataLoader script",
    "batched": "clients trained in one batched call, one epoch",
    "wire": "wire, one delta",
    "round": "full round, CNN clients; ratios are against the reference",
    "runtime": "runtime, idle clients; idle is less the server's work",
    "memory": "memory, all clients and the server in one process",
    "growth": "growth, idle clients, CPU seconds of a round",
    "worker": "worker, three deployed sites, CNN on digits",
    "registered": "registered, light idle clients, 100 a round; CPU seconds of a round",
    "straggler": "straggler, one client ten times slower",
}
HIDDEN = ("failed", "traceback", "seconds_measuring")


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
    for part, title in TITLES.items():
        if part in results:
            console.print(table(title, results[part]["rows"]))
    if share := results.get("runtime", {}).get("overhead_fraction"):
        engine = results["runtime"]["overhead_engine"]
        console.print(f"an idle round on {engine} is {100 * share:.1f} % of a full one")


def table(title: str, rows: Mapping[str, Row]) -> Table:
    """Lay out rows: a column for each single figure, a line of text for what was skipped."""
    measured = [row for row in rows.values() if "skipped" not in row]
    figures = (key for row in measured for key, value in row.items() if not isinstance(value, list))
    keys = [key for key in dict.fromkeys(figures) if key not in HIDDEN]
    laid_out = Table(title=title, title_justify="left")
    laid_out.add_column("", overflow="fold")
    for key in keys:
        laid_out.add_column(key.removesuffix("_seconds").replace("_", " "), justify="right")
    for name, row in rows.items():
        if "skipped" in row:
            laid_out.add_row(f"{name}: {escape(str(row['skipped'])[:60])}")
        else:
            laid_out.add_row(name, *(show(key, row.get(key)) for key in keys))
    return laid_out


def show(key: str, value: Any) -> str:
    """Write a figure in the unit that the name of its key gives away."""
    if value is None:
        return "-"
    if "seconds" in key:
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"
    if "bytes" in key:
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.2f} MiB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
