"""The tables that `mh-pfedhn bench` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(results: dict[str, Any], console: Console) -> None:
    """Print what was measured, part by part."""
    machine = results["machine"]
    console.print(
        f"\n{machine['cpu']}, {machine['cores']} cores, {machine['threads']} torch threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, GPU {machine['gpu']} "
        f"(torch for CUDA {machine['cuda']}), load {machine['load']:.1f}; "
        f"measured peaks {machine['flops'] / 1e9:.0f} GFLOP/s, "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s",
        highlight=False,
        soft_wrap=True,
    )
    for part, draw in DRAW.items():
        if part in results:
            console.print(draw(results[part]))
    if any("cuda" in row for row in results.get("server", {}).get("sizes", [])):
        console.print(_server_gpu(results["server"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


def _bound(row: dict[str, Any]) -> tuple[str, str]:
    return (row["bounded_by"], f"{row['distance']:.1f}x") if row else ("-", "-")


def _server(part: dict[str, Any]) -> Table:
    table = _table(
        "server, CPU seconds of a round; in brackets against sequential", "clients x parameters",
        "sequential", "reference", "Adam", "least squares", "at rest", "peak: Adam", "at rest",
    )  # fmt: skip
    for row in part["sizes"]:
        rest, squares = row.get("at_rest", {}), row.get("least_squares", {})
        table.add_row(
            f"{row['num_clients']} x {row['num_parameters']:,}",
            _seconds(row.get("sequential_cpu_seconds")),
            _seconds(row.get("reference_cpu_seconds")),
            *(_rule(found) for found in (row, squares, rest)),
            *(_peak(found) for found in (row, rest)),
        )
    return table


def _rule(row: dict[str, Any]) -> str:
    if "parallel_cpu_seconds" not in row:
        return str(row.get("skipped", "-"))[:26]
    ratio = f" ({row['cpu_ratio']:.1f}x)" if "cpu_ratio" in row else ""
    return _seconds(row["parallel_cpu_seconds"]) + ratio


def _peak(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else "-"


def _server_gpu(part: dict[str, Any]) -> Table:
    table = _table(
        "server on the GPU, seconds of a round", "clients x parameters", "sequential", "Adam",
        "at rest", "memory: Adam", "at rest",
    )  # fmt: skip
    for row in part["sizes"]:
        found = row.get("cuda", {})
        adam, rest = found.get("adam", {}), found.get("at_rest", {})
        table.add_row(
            f"{row['num_clients']} x {row['num_parameters']:,}",
            _seconds(adam.get("sequential_seconds")),
            *(
                _seconds(r.get("parallel_seconds"))
                + (f" ({r['ratio']:.1f}x)" if "ratio" in r else "")
                for r in (adam, rest)
            ),
            *(
                f"{r['gpu_bytes'] / 2**30:.2f} GiB" if "gpu_bytes" in r else "-"
                for r in (adam, rest)
            ),
        )
    return table


def _client(part: dict[str, Any]) -> Table:
    table = _table(
        "client, one step of 64", "model/device", "step", "DataLoader script", "ratio",
        "data alone", "its DataLoader", "test batch", "bounded by", "from bound",
    )  # fmt: skip
    for name, row in part["models"].items():
        if "skipped" in row:
            table.add_row(name, row["skipped"][:60])
            continue
        keys = ("batches_seconds", "dataloader_batches_seconds", "test_batch_seconds")
        table.add_row(
            name,
            _seconds(row["step_seconds"]),
            _seconds(row["dataloader_step_seconds"]),
            f"{row['ratio']:.1f}",
            *(_seconds(row[key]) for key in keys),
            *_bound(row.get("bounds", {})),
        )
    return table


def _batched(part: dict[str, Any]) -> Table:
    table = _table(
        "clients trained in one batched call, one epoch", "model/device", "clients", "steps",
        "one by one", "batched", "ratio", "difference",
    )  # fmt: skip
    for name, row in part.items():
        if "skipped" in row:
            table.add_row(name, row["skipped"][:60])
            continue
        table.add_row(
            name,
            str(row["num_clients"]),
            str(row["steps"]),
            _seconds(row["one_by_one_seconds"]),
            _seconds(row["batched_seconds"]),
            f"{row['ratio']:.2f}",
            f"{row['difference']:.0e}",
        )
    return table


def _wire(part: dict[str, Any]) -> Table:
    table = _table("wire, one delta", "format", "bytes", "encode", "decode", "from bound")
    for name, row in part.items():
        table.add_row(
            name,
            f"{row['bytes']:,}",
            _seconds(row["encode_seconds"]),
            _seconds(row["decode_seconds"]),
            _bound(row["bounds"])[1],
        )
    return table


def _round(part: dict[str, Any]) -> Table:
    title = f"full round, {part['num_clients']} CNN clients, {part['data']}"
    columns = ("round", "against reference", "CPU", "server", "clients (summed)", "note")
    table = _table(title, "run", *columns)
    for name, row in part["runs"].items():
        seconds = row.get("seconds_round", row.get("total"))
        reference = part["runs"]["reference-gpu" if name.endswith("gpu") else "reference"]
        table.add_row(
            name,
            _seconds(seconds),
            f"{reference['total'] / seconds:.2f}" if seconds and "total" in reference else "-",
            _seconds(row.get("cpu_seconds")),
            _seconds(row.get("seconds_server", row.get("server"))),
            _seconds(row.get("seconds_clients", row.get("train"))),
            row.get("skipped", "")[:60],
        )
    return table


def _runtime(part: dict[str, Any]) -> Table:
    title = "runtime, idle clients (less the server's work)"
    table = _table(title, "engine", "round", "less", "CPU less", "note")
    for name, row in part["engines"].items():
        table.add_row(
            name,
            _seconds(row.get("seconds_round")),
            _seconds(row.get("idle_seconds")),
            _seconds(row.get("idle_cpu_seconds")),
            row.get("skipped", "")[:60],
        )
    if "overhead_fraction" in part:
        share = f"{100 * part['overhead_fraction']:.1f} % of a full round"
        table.add_row("overhead", share, "", "", part["overhead_engine"])
    return table


def _memory(part: dict[str, Any]) -> Table:
    table = _table("memory, all clients and the server in one process", "clients", "peak", "limit")
    peak = part.get("peak_bytes")
    shown = part["skipped"][:60] if peak is None else f"{peak / 1e9:.2f} GB"
    table.add_row(str(part["num_clients"]), shown, f"{part['limit_bytes'] / 1e9:.0f} GB")
    return table


def _growth(part: dict[str, Any]) -> Table:
    table = _table("growth, idle clients", "clients", "rounds", "round", "resident", "last/first")
    for row in [part["rounds"], *part["clients"]]:
        if "skipped" in row:
            table.add_row(str(row["num_clients"]), row["skipped"][:40])
            continue
        weights, seconds = row["resident_bytes"], row["seconds"]
        table.add_row(
            str(row["num_clients"]),
            str(len(seconds)),
            _seconds(sorted(seconds)[len(seconds) // 2]),
            f"{weights[-1] / 2**20:.0f} MiB",
            f"{weights[-1] / weights[min(len(weights) - 1, 2)]:.3f}",
        )
    return table


DRAW = {
    "server": _server,
    "client": _client,
    "batched": _batched,
    "wire": _wire,
    "round": _round,
    "runtime": _runtime,
    "memory": _memory,
    "growth": _growth,
}
