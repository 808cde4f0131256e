"""The run folder: config, metrics by round, clients, summary, picture, checkpoints.

Every finished round is on disk before the next one starts, and the summary says "interrupted"
until the run ends, so a killed run still tells how far it came. A folder belongs to one server at a
time, and holds one run: another run is refused unless it resumes the one that is there.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from filelock import FileLock, Timeout

from common import messages
from common.config import RunConfig
from common.errors import ConfigError, RunError
from common.files import DEFAULT_ROOT, best_round, replace_file
from common.log import logger
from common.messages import ALONE, MOST_TESTED, Evaluation, Gain

LOCK = ".lock"


def run_folder_path(config: RunConfig) -> Path:
    """Return the absolute folder of a run: `output-dir`, or a dated one below the user's home."""
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
    """Writes one run's folder.

    Nothing in the folder changes before `begin`. A full disk costs what could not be written, not
    the run: it is logged, and written with the next round. Raises RunError where another server is
    writing to the folder, ConfigError where it holds another run.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self._config = config
        self._rows: list[dict[str, float]] = []
        self._client_rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._begun, self._incomplete = False, False
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._own()
        try:
            self._require_free()
        except ConfigError:
            self._lock.release()
            raise

    def _own(self) -> FileLock:
        """Lock the folder until this process ends or the run closes."""
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunError(
                f"another server is writing to {self.path}. Two runs cannot share a folder: give "
                "this one an output-dir of its own, or wait until the other has ended."
            ) from None
        return lock

    def _require_free(self) -> None:
        rows, source = self.path / "metrics.jsonl", self._config.run.resume_from
        resumes = bool(source) and Path(source).expanduser().resolve().is_relative_to(
            self.path.resolve()
        )
        if rows.exists() and rows.stat().st_size > 0 and not resumes:
            raise ConfigError(
                f"{self.path} already holds a run. To go on with it, set resume-from to this "
                "folder; to start another, choose another output-dir, or delete the folder."
            )

    def begin(
        self,
        rows: Sequence[Mapping[str, float]] = (),
        client_rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start the files, with the rows of the run that is being resumed, if any."""
        self._begun = True
        self._rows = [dict(row) for row in rows]
        replace_file(self.path / "config.json", json.dumps(self._config.flat(), indent=2))
        self._write_rows()
        self.note_clients(client_rows)
        self._write_summary("interrupted")

    @property
    def rows(self) -> Sequence[Mapping[str, float]]:
        """The rows of metrics.jsonl so far."""
        return self._rows

    @property
    def client_rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of clients.csv so far."""
        return self._client_rows

    def add_round(self, row: Mapping[str, float], rounds: int) -> None:
        """Append a round's row and log it as a line that a person can follow."""
        self._rows.append(dict(row))
        try:
            if self._incomplete:
                self._write_rows()
            else:
                with (self.path / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self._write_summary("interrupted")
            self._incomplete = False
        except OSError as error:
            self._incomplete = True
            logger.error("Row %s is not on disk, the run goes on: %s", row["round"], error)
        logger.info("%s", self._line(row, rounds))

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        replace_file(self.path / "metrics.jsonl", lines)

    def _line(self, row: Mapping[str, float], rounds: int) -> str:
        server_round = int(row["round"])
        seconds = [r["seconds_round"] for r in self._rows[-5:]]
        left = (rounds - server_round) * sum(seconds) / len(seconds)
        found = f"accuracy {row['accuracy_micro']:.3f}" if "accuracy_micro" in row else "trained"
        found += f" (alone {row['accuracy_alone']:.3f})" if "accuracy_alone" in row else ""
        for key in ("epsilon_max", "user_epsilon"):
            found += f"  {key} {row[key]:.2f}" if key in row else ""
        found += f"  loss {row['train_loss']:.3f}" if math.isfinite(row["train_loss"]) else ""
        lost = int(row["num_failed"] + row["num_unanswered"])
        return (
            f"round {server_round:>{len(str(rounds))}}/{rounds}  {found}  "
            f"up {row['bytes_up'] / 1e6:.1f} MB down {row['bytes_down'] / 1e6:.1f} MB  "
            f"{row['seconds_round']:.1f} s (server {row['seconds_server']:.1f} s)  "
            f"left {_clock(left)}" + (f"  lost {lost} clients" if lost else "")
        )

    def note_clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace clients.csv by the newest evaluation of every client."""
        if not rows:
            return
        fresh = {row["client_id"]: dict(row) for row in rows}
        kept = [r for r in self._client_rows if r["client_id"] not in fresh]
        self._client_rows = kept + list(fresh.values())
        text = io.StringIO(newline="")
        names = dict.fromkeys(name for row in self._client_rows for name in row)
        writer = csv.DictWriter(text, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(self._client_rows)
        try:
            replace_file(self.path / "clients.csv", text.getvalue())
        except OSError as error:
            logger.error("clients.csv is not on disk, the run goes on: %s", error)

    def note_attendance(self, attendance: Mapping[str, Any]) -> None:
        """Replace attendance.json: who is there, who replied when, who was refused and why."""
        text = json.dumps({"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", **attendance})
        try:
            replace_file(self.path / "attendance.json", text)
        except OSError as error:
            logger.error("attendance.json is not on disk, the run goes on: %s", error)

    def close(self, status: str, reason: str = "") -> None:
        """Write the final summary and the picture, let go of the folder.

        `status` as in design.md, "Outputs". A run that never began leaves another's summary alone.
        """
        try:
            if self._begun or not (self.path / "summary.json").exists():
                if self._incomplete:
                    self._write_rows()
                self._write_summary(status, reason)
                self._draw()
        except OSError as error:
            logger.error("The last results are not on disk: %s", error)
        finally:
            self._lock.release()
        if gain := self._gain():
            logger.info("%s", str(gain).capitalize())
        logger.info("Run %s. Results in %s", status, self.path)

    def _gain(self) -> Gain | None:
        """Sum up the newest evaluations of the clients that trained alone as well."""
        measured = (row for row in self._client_rows if "gain" in row)
        return Gain.of((row["num_test"], row["gain"]) for row in measured)

    def _draw(self) -> None:
        if not any("accuracy_micro" in row for row in self._rows):
            return
        from server_app.output.curves import draw_curves  # matplotlib: a second
        from server_app.output.figures import draw_steps

        try:
            draw_curves(self.path)
            draw_steps(self.path)
        except (OSError, ValueError) as error:
            logger.warning("The pictures could not be drawn: %s", error)

    def _write_summary(self, status: str, reason: str = "") -> None:
        config = self._config
        scored = [row for row in self._rows if "accuracy_micro" in row]
        gain = self._gain()
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
            "best": best_round(self._rows),
            "last": scored[-1] if scored else None,
            "gain": gain.micro if gain else None,
            "num_gaining": gain.num_gaining if gain else 0,
            "num_measured": gain.num_measured if gain else 0,
            "bytes_up": sum(int(row["bytes_up"]) for row in self._rows),
            "bytes_down": sum(int(row["bytes_down"]) for row in self._rows),
            "seconds": time.monotonic() - self._started,
        }
        replace_file(self.path / "summary.json", json.dumps(summary, indent=2))

    def _families(self) -> list[str]:
        """Name the model families: as the run config lists them, where the sizes agree with it.

        The server knows sizes alone; families that participants declared are named by them.
        """
        names = [name.strip() for name in self._config.client.models.split(",")]
        sizes = sorted({int(row["num_parameters"]) for row in self._client_rows})
        return names if len(names) == len(sizes) else [f"{size} parameters" for size in sizes]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summarise(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Summarise one evaluation of the federation; {} without any.

    accuracy_micro: sum of correct over sum of examples (the paper's metric), of which nobody's
    are more than ten times the median; accuracy_macro: mean over clients; accuracy_std: population
    standard deviation over clients; accuracy_worst10: mean of the worst tenth of clients (at least
    one); test_loss: mean over examples, in nats; accuracy_x: micro accuracy of a further predictor
    x; accuracy_validation: that of the validation examples of clients that have some, by which a
    round is chosen; validation_midmean: the mean over the middle half of clients, by which a run
    ends; share_gaining: that of clients better than their model trained alone, if measured.
    """
    if not evaluations:
        return {}
    rows = [evaluations[client_id] for client_id in sorted(evaluations)]
    accuracies = sorted(row.num_correct / row.num_test for row in rows)
    counts = [(row.num_test, row.num_correct) for row in rows]
    worst = accuracies[: max(1, math.ceil(0.1 * len(accuracies)))]
    weights = messages.bounded_counts([row.num_test for row in rows], MOST_TESTED)
    return {
        "accuracy_micro": messages.micro_accuracy(counts),
        "accuracy_macro": fmean(accuracies),
        "accuracy_std": pstdev(accuracies),
        "accuracy_worst10": fmean(worst),
        "test_loss": messages.weighted_mean(zip(weights, (r.test_loss for r in rows), strict=True)),
        **_others(rows),
    }


def _others(rows: Sequence[Evaluation]) -> dict[str, float]:
    """Summarise validation and the further predictors, each over the clients that report it."""
    validated = [(row.num_validation, row.num_validated) for row in rows if row.num_validation]
    each = sorted(correct / total for total, correct in validated)
    found = {"accuracy_validation": messages.micro_accuracy(validated)} if validated else {}
    middle = each[len(each) // 4 : len(each) - len(each) // 4]
    found |= {"validation_midmean": fmean(middle)} if len(middle) < len(each) else {}  # of four on
    for name in dict.fromkeys(name for row in rows for name in row.others):
        having = [row for row in rows if name in row.others]
        counts = [(row.num_test, row.others[name]) for row in having]
        found[f"accuracy_{name}"] = messages.micro_accuracy(counts)
        if name == ALONE:
            found["share_gaining"] = fmean(row.num_correct > row.others[name] for row in having)
    return found
