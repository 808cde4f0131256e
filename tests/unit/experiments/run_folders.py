"""Run folders as the server writes them, with numbers that are easy to check."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import RunConfig

SIZES = {"cnn": 1000, "vgg8": 2000}
DATA: dict[str, Any] = {
    "dataset": "digits", "partition": "iid", "num_partitions": 4,
}  # fmt: skip
"""Settings of `write_seed` under which the labels of clients can be had at once."""
COLUMNS = "client_id num_parameters num_chunks num_train num_test correct accuracy test_loss"


def metric_row(server_round: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "round": server_round,
        "train_loss": 2.0 / server_round,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "seconds_round": 10.0,
        "seconds_server": 1.0,
        "seconds_clients": 8.0,
        "num_failed": 0,
        "num_unanswered": 0,
    }
    if accuracy is not None:
        row |= {
            "accuracy_micro": accuracy,
            "accuracy_macro": accuracy - 0.02,
            "accuracy_std": 0.1,
            "accuracy_worst10": accuracy / 2,
            "test_loss": 2.0 - accuracy,
        }
    return row | more


def write_run(folder: Path, *, rounds: int = 4, models: str = "cnn,vgg8", clients: int = 4) -> Path:
    """`rounds` rounds at 10 %, 20 %, ... and four clients at 50, 60, 70, 80 %."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig.parse(
        {
            "method": "mh-pfedhn",
            "batch-size": 64,
            "models": models,
            "num-partitions": clients,
            "rounds": rounds,
            "output-dir": str(folder),
        }
    )
    (folder / "config.json").write_text(json.dumps(config.flat()))
    rows = [metric_row(k, 0.1 * k) for k in range(1, rounds + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_clients(folder, models.split(","), [0.5 + 0.1 * i for i in range(clients)])
    summary = {
        "status": "completed",
        "reason": "",
        "method": "mh-pfedhn",
        "model_families": models.split(","),
        "num_clients": clients,
        "rounds": rounds,
        "seed": 42,
        "schedule": {"max_in_flight": 1, "buffer_size": 1},
        "best": rows[-1],
        "last": rows[-1],
        "bytes_up": rounds * 1_000_000,
        "bytes_down": rounds * 2_000_000,
        "seconds": 75.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_clients(
    folder: Path, names: list[str], accuracies: Sequence[float], alone: Sequence[float] = ()
) -> None:
    """Clients in reverse order: a reader must not rely on the file's order."""
    with (folder / "clients.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS.split(), *(["accuracy_alone", "gain"] if alone else [])])
        for i, accuracy in reversed([*enumerate(accuracies)]):
            size = SIZES[names[i * len(names) // len(accuracies)]]
            row = [i, size, 1, 30, 10, round(10 * accuracy), accuracy, 1.0]
            writer.writerow([*row, *((alone[i], accuracy - alone[i]) if alone else ())])


def write_seed(
    folder: Path,
    *,
    method: str = "mh-pfedhn",
    seed: int = 1,
    accuracies: tuple[float, ...] = (0.1, 0.4),
    clients: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8),
    alone: tuple[float, ...] = (),
    status: str = "completed",
    row: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run with the given micro accuracies by round and last accuracies by client."""
    write_run(folder, rounds=max(1, len(accuracies)), clients=len(clients))
    config = json.loads((folder / "config.json").read_text())
    config |= {key.replace("_", "-"): value for key, value in settings.items()}
    config |= {"method": method, "seed": seed, "rounds": settings.get("rounds", len(accuracies))}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [metric_row(k, a, **(row or {})) for k, a in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"method": method, "seed": seed, "status": status, "rounds": len(rows)}
    summary |= {
        "best": max(rows, key=lambda r: r["accuracy_micro"], default=None),
        "last": rows[-1] if rows else None,
        "reason": "" if status == "completed" else "RunError: <no> client came",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    write_clients(folder, config["models"].split(","), clients, alone)
    return folder
