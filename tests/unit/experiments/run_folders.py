"""Run folders as the server writes them, with numbers that are easy to check."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from common.config import RunConfig

SIZES = {"cnn": 1000, "vgg8": 2000}
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
        {"models": models, "num-partitions": clients, "rounds": rounds, "output-dir": str(folder)}
    )
    (folder / "config.json").write_text(json.dumps(config.flat()))
    rows = [metric_row(k, 0.1 * k) for k in range(1, rounds + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_clients(folder, models.split(","), clients)
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


def write_clients(folder: Path, names: list[str], clients: int) -> None:
    """Clients in reverse order: a reader must not rely on the file's order."""
    with (folder / "clients.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.split())
        for i in reversed(range(clients)):
            accuracy = 0.5 + 0.1 * i
            size = SIZES[names[i * len(names) // clients]]
            writer.writerow([i, size, 1, 30, 10, round(10 * accuracy), accuracy, 1.0])
