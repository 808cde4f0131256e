"""The tables that `mh-pfedhn bench` prints: for each part its rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.benchmarks.measuring import Row

Format = Callable[[Any], str]


def seconds(value: float) -> str:
    """Write seconds, those below one as milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


def times(value: float) -> str:
    """Write how many times as fast or as large something is."""
    return f"{value:.1f}x"


def gib(value: float) -> str:
    """Write bytes as GiB."""
    return f"{value / 2**30:.2f} GiB"


def count(value: int) -> str:
    """Write a whole number with its thousands apart."""
    return f"{value:,}"


RULES = ("adam", "least_squares", "at_rest")
COLUMNS: Mapping[str, tuple[str, Mapping[str, tuple[str, Format]]]] = {
    "server": (
        "server, CPU seconds of a round; ratios are against the sequential rule",
        {
            "sequential": ("sequential_cpu_seconds", seconds),
            "reference": ("reference_cpu_seconds", seconds),
            "Adam": ("parallel_cpu_seconds", seconds),
            "ratio": ("cpu_ratio", times),
            "least squares": ("least_squares.parallel_cpu_seconds", seconds),
            "ratio ": ("least_squares.cpu_ratio", times),
            "at rest": ("at_rest.parallel_cpu_seconds", seconds),
            "ratio  ": ("at_rest.cpu_ratio", times),
            "peak: Adam": ("peak_bytes", gib),
            "peak: at rest": ("at_rest.peak_bytes", gib),
        },
    ),
    "server-gpu": (
        "server on the GPU, seconds of a round",
        {
            "sequential": ("adam.sequential_seconds", seconds),
            "Adam": ("adam.parallel_seconds", seconds),
            "ratio": ("adam.ratio", times),
            "at rest": ("at_rest.parallel_seconds", seconds),
            "ratio ": ("at_rest.ratio", times),
            "memory: Adam": ("adam.gpu_bytes", gib),
            "memory: at rest": ("at_rest.gpu_bytes", gib),
        },
    ),
    "client": (
        "client, one step of 64",
        {
            "step": ("step_seconds", seconds),
            "DataLoader script": ("dataloader_step_seconds", seconds),
            "ratio": ("ratio", times),
            "data alone": ("batches_seconds", seconds),
            "its DataLoader": ("dataloader_batches_seconds", seconds),
            "test batch": ("test_batch_seconds", seconds),
            "bounded by": ("bounds.bounded_by", str),
            "from bound": ("bounds.distance", times),
        },
    ),
    "batched": (
        "clients trained in one batched call, one epoch",
        {
            "clients": ("num_clients", count),
            "steps": ("steps", count),
            "one by one": ("one_by_one_seconds", seconds),
            "batched": ("batched_seconds", seconds),
            "ratio": ("ratio", times),
            "difference": ("difference", "{:.0e}".format),
        },
    ),
    "wire": (
        "wire, one delta",
        {
            "bytes": ("bytes", count),
            "encode": ("encode_seconds", seconds),
            "decode": ("decode_seconds", seconds),
            "from bound": ("bounds.distance", times),
        },
    ),
    "round": (
        "full round, CNN clients",
        {
            "round": ("seconds_round", seconds),
            "against reference": ("ratio", times),
            "CPU": ("cpu_seconds", seconds),
            "server": ("seconds_server", seconds),
            "clients (summed)": ("seconds_clients", seconds),
        },
    ),
    "runtime": (
        "runtime, idle clients (less the server's work)",
        {
            "round": ("seconds_round", seconds),
            "less": ("idle_seconds", seconds),
            "CPU less": ("idle_cpu_seconds", seconds),
        },
    ),
    "memory": (
        "memory, all clients and the server in one process",
        {
            "clients": ("num_clients", count),
            "peak": ("peak_bytes", gib),
            "limit": ("limit_bytes", gib),
        },
    ),
    "worker": (
        "worker, three deployed sites, CNN on digits",
        {
            "round": ("round_seconds", seconds),
            "first round": ("first_seconds", seconds),
            "of a round without": ("share", "{:.2f}".format),
        },
    ),
    "straggler": (
        "straggler, one client ten times slower",
        {
            "equal clients": ("equal_seconds", seconds),
            "one slow": ("slow_seconds", seconds),
            "growth": ("growth", "{:+.0%}".format),
        },
    ),
    "growth": (
        "growth, idle clients",
        {
            "clients": ("num_clients", count),
            "rounds": ("num_rounds", count),
            "CPU a round": ("typical_seconds", seconds),
            "resident": ("last_bytes", gib),
            "last/third": ("last_by_third", "{:.3f}".format),
        },
    ),
}


def print_tables(results: Row, console: Console) -> None:
    """Print what was measured, part by part."""
    machine = results["machine"]
    console.print(
        f"\n{machine['cpu']}, {machine['cores']} cores, {machine['threads']} torch threads, "
        f"{gib(machine['memory_bytes'])}, GPU {machine['gpu']} (torch for CUDA "
        f"{machine['cuda']}), load {machine['load']:.1f}; measured peaks "
        f"{machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.1f} GB/s",
        highlight=False,
        soft_wrap=True,
    )
    for part, (title, columns) in COLUMNS.items():
        rows = rows_of(part, results)
        if rows:
            console.print(_table(title, columns, rows))
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
    if part == "round":
        return {name: _against_reference(name, found["runs"]) for name in found.get("runs", {})}
    if part == "memory":
        return {"memory": found} if found else {}
    inner = {"client": "models", "runtime": "engines"}
    return dict(found.get(inner[part], {}) if part in inner else found)


def _against_reference(name: str, runs: Mapping[str, Row]) -> Row:
    row = runs[name]
    reference = runs["reference-gpu" if name.endswith("gpu") else "reference"]
    if name.startswith("reference"):
        names = {"total": "seconds_round", "server": "seconds_server", "train": "seconds_clients"}
        row = row | {new: row[old] for old, new in names.items() if old in row}
    if "seconds_round" in row and "total" in reference:
        row = row | {"ratio": reference["total"] / row["seconds_round"]}
    return row


def _table(title: str, columns: Mapping[str, tuple[str, Format]], rows: Mapping[str, Row]) -> Table:
    table = Table("", title=title, title_justify="left")
    for header in columns:
        table.add_column(header, justify="right")
    for name, row in rows.items():
        if "skipped" in row:
            table.add_row(f"{name}: {escape(str(row['skipped'])[:60])}")
            continue
        cells = [_cell(row, key, form) for key, form in columns.values()]
        table.add_row(name, *cells)
    return table


def _cell(row: Any, key: str, form: Format) -> str:
    for part in key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return "-" if row is None else form(row)
