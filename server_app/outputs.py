"""The run folder: config, metrics by round, clients, summary, picture, checkpoints.

Every finished round is on disk before the next one starts, and the summary says "interrupted"
until the run ends, so a killed run still tells how far it came.
"""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import ConfigError
from common.log import logger

DEFAULT_ROOT = Path("~/mh-pfedhn-runs")


def run_folder_path(config: RunConfig) -> Path:
    """Return the absolute folder of a run: `output-dir`, or a dated one below the user's home.

    Raises
    ------
    ConfigError
        `output-dir` is relative: the ServerApp's working directory is not the user's.
    """
    if config.run.output_dir:
        path = Path(config.run.output_dir).expanduser()
        if not path.is_absolute():
            raise ConfigError(
                f"output-dir = {config.run.output_dir!r} is relative. The server does not run "
                "where `flwr run` was typed: give an absolute path."
            )
        return path
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.run.run_name or config.run.method)
    return DEFAULT_ROOT.expanduser() / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


class RunFolder:
    """Writes one run's folder."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self._config = config
        self._rows: list[dict[str, float]] = []
        self._client_rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.json", json.dumps(config.flat(), indent=2))
        (path / "metrics.jsonl").write_text("")
        self._write_summary("interrupted")

    @property
    def rows(self) -> Sequence[Mapping[str, float]]:
        """The rows of metrics.jsonl so far."""
        return self._rows

    @property
    def client_rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of clients.csv so far."""
        return self._client_rows

    def restore(
        self, rows: Sequence[Mapping[str, float]], client_rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Start metrics.jsonl and clients.csv with those of the run that is being resumed."""
        self._rows = [dict(row) for row in rows]
        self.note_clients(client_rows)
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_atomically(self.path / "metrics.jsonl", lines)

    def add_round(self, row: Mapping[str, float], rounds: int) -> None:
        """Append a round's row and log it as a line that a person can follow."""
        self._rows.append(dict(row))
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._write_summary("interrupted")
        logger.info("%s", self._line(row, rounds))

    def _line(self, row: Mapping[str, float], rounds: int) -> str:
        server_round = int(row["round"])
        seconds = [r["seconds_round"] for r in self._rows[-5:]]
        left = (rounds - server_round) * sum(seconds) / len(seconds)
        found = f"accuracy {row['accuracy_micro']:.3f}" if "accuracy_micro" in row else "trained"
        lost = int(row["num_failed"] + row["num_unanswered"])
        return (
            f"round {server_round:>{len(str(rounds))}}/{rounds}  {found}  "
            f"loss {row['train_loss']:.3f}  up {_mb(row['bytes_up'])} down {_mb(row['bytes_down'])}"
            f"  {row['seconds_round']:.1f} s (server {row['seconds_server']:.1f} s)  "
            f"left {_clock(left)}" + (f"  lost {lost} clients" if lost else "")
        )

    def note_clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace clients.csv by the newest evaluation of every client."""
        if not rows:
            return
        fresh = {row["client_id"]: dict(row) for row in rows}
        kept = [r for r in self._client_rows if r["client_id"] not in fresh]
        self._client_rows = kept + list(fresh.values())
        temporary = self.path / "clients.csv.tmp"
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self._client_rows[0]))
            writer.writeheader()
            writer.writerows(self._client_rows)
        os.replace(temporary, self.path / "clients.csv")

    def close(self, status: str, reason: str = "") -> None:
        """Write the final summary and the picture; `status` as in design.md, "Outputs"."""
        self._write_summary(status, reason)
        self._draw()
        logger.info("Run %s. Results in %s", status, self.path)

    def _draw(self) -> None:
        if not any("accuracy_micro" in row for row in self._rows):
            return
        from server_app.picture import draw_curves  # matplotlib takes a second to import

        try:
            draw_curves(self.path)
        except (OSError, ValueError) as error:
            logger.warning("curves.png could not be drawn: %s", error)

    def _write_summary(self, status: str, reason: str = "") -> None:
        config = self._config
        scored = [row for row in self._rows if "accuracy_micro" in row]
        summary: dict[str, Any] = {
            "status": status,
            "reason": reason,
            "method": config.run.method,
            "model_families": self._families(),
            "num_clients": len(self._client_rows),
            "rounds": int(self._rows[-1]["round"]) if self._rows else 0,
            "seed": config.run.seed,
            "schedule": {
                "max_in_flight": config.schedule.max_in_flight,
                "buffer_size": config.schedule.buffer_size,
            },
            "best": max(scored, key=lambda row: row["accuracy_micro"]) if scored else None,
            "last": scored[-1] if scored else None,
            "bytes_up": sum(int(row["bytes_up"]) for row in self._rows),
            "bytes_down": sum(int(row["bytes_down"]) for row in self._rows),
            "seconds": time.monotonic() - self._started,
        }
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2))

    def _families(self) -> list[str]:
        """Name the model families: as the run config lists them, where the sizes agree with it.

        The server knows sizes alone. Where participants declared their own models, the families
        are named by their sizes.
        """
        names = [name.strip() for name in self._config.client.models.split(",")]
        sizes = sorted({int(row["num_parameters"]) for row in self._client_rows})
        return names if len(names) == len(sizes) else [f"{size} parameters" for size in sizes]


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
