"""Read run folders: config.json, metrics.jsonl, clients.csv, summary.json (docs/design.md)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import psutil

from common.errors import ConfigError, RunError, unknown_name
from common.files import output_root, read_json, read_rows, replace_file
from common.messages import Gain
from experiments.run.engines.processes import is_alive

RUN_FILES = ("summary.json", "metrics.jsonl")
NOTE = "cell.json"
"""What a sweep notes about a run of its own: variant, grid values, command, process."""
DEEPEST = 4
CLOCK_SLACK_S = 2.0


@dataclass(frozen=True)
class ClientRow:
    """One line of clients.csv: a client's newest evaluation; `alone` where it was measured."""

    client_id: str
    num_parameters: int
    num_test: int
    accuracy: float
    alone: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run left on disk. Parts that were never written are empty.

    `left_out` says why a comparison does not count the run; empty where it does.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    clients: tuple[ClientRow, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run folder; raise RunError where it holds no run, or one that cannot be read."""
        if not is_run(folder):
            raise RunError(f"{folder} holds no run: neither {' nor '.join(RUN_FILES)} is in it.")
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what there is in a folder, which may be nothing yet; raise RunError as `load`."""
        try:
            return cls(
                folder,
                read_json(folder / "config.json"),
                tuple(read_rows(folder / "metrics.jsonl")),
                _read_clients(folder / "clients.csv"),
                read_json(folder / "summary.json"),
                read_json(folder / NOTE),
            )
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"run folder {folder} cannot be read: {type(error).__name__}: {error}."
            ) from error

    @property
    def name(self) -> str:
        """The name by which `show` finds the run: its folder's."""
        return self.folder.name

    @property
    def seed(self) -> int:
        """Seed of the run; one that ended before it had a config is known by its summary."""
        return int(self.config.get("seed", self.summary.get("seed", 0)))

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.config.get("method") or self.summary.get("method") or "unknown")

    @property
    def variant(self) -> str:
        """The variant of the sweep that started the run, or ""."""
        return str(self.note.get("variant", ""))

    @cached_property
    def status(self) -> str:
        """How the run ended; "running" where a sweep's process is still at work on it."""
        status = str(self.summary.get("status", "unknown"))
        running = status != "completed" and process_of(self.note) is not None
        return "running" if running else status

    @property
    def rounds_done(self) -> int:
        """Rounds that are on disk."""
        return int(self.rows[-1]["round"]) if self.rows else 0

    @property
    def rounds_planned(self) -> int:
        """Rounds that the run was to have."""
        return int(self.config.get("rounds", self.rounds_done))

    @cached_property
    def gain(self) -> Gain | None:
        """What joining was worth; None where no client trained alone as well."""
        return gain_of(self.clients)

    def last(self, key: str) -> float | None:
        """Return a value of the last evaluated round."""
        return _number((self.summary.get("last") or {}).get(key))

    def best(self, key: str) -> float | None:
        """Return a value of the round that is best on validation; None without validation."""
        return _number((self.summary.get("best") or {}).get(key))

    def total(self, key: str) -> float:
        """Add a column of all rounds up; a resumed run's summary times its last part alone."""
        return sum(_number(row.get(key)) or 0.0 for row in self.rows)

    def changed_at(self) -> float:
        """Return when the run last wrote, in seconds since the epoch; 0 where nothing is there."""
        paths = [self.folder / name for name in RUN_FILES]
        return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)

    def families(self) -> dict[str, str]:
        """Say which architecture each client has: {client_id: name}.

        The server knows sizes alone. In a simulation the client_id is the partition, and the run
        config's `models` says which block of partitions has which model. Where participants chose
        for themselves (a size that does not fit the block), clients are named by their size.
        """
        blocks = _by_partition(self.config, self.clients)
        sizes = {(blocks.get(c.client_id, ""), c.num_parameters) for c in self.clients}
        if blocks and len(sizes) == len({name for name, _ in sizes}):
            return blocks
        return {c.client_id: f"{c.num_parameters:,} parameters" for c in self.clients}


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return any((folder / name).is_file() for name in RUN_FILES)


def run_folders(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Find the run folders at or below a folder, in order of their names."""
    if is_run(folder):
        yield folder
    elif depth and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from run_folders(path, depth - 1)


def new_folder(name: str) -> Path:
    """Return a path for a new run: the name and the time, below the output root."""
    stem = output_root() / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    ends = ("", *(f"-{i}" for i in range(2, 100)))
    return next(path for end in ends if not (path := stem.with_name(stem.name + end)).exists())


def find_run(name_or_path: str) -> Run:
    """Load a run by its folder's path, or by its name under the output root.

    Raises ConfigError where there is no such run, RunError where it cannot be read.
    """
    for folder in (Path(name_or_path).expanduser(), output_root() / name_or_path):
        if folder.is_dir():
            return Run.load(folder.resolve())
    known = sorted(path.parent.name for path in output_root().glob("*/summary.json"))
    if not known:
        raise ConfigError(
            f"no run {name_or_path!r}: {output_root()} holds none at all. Give the path of a run "
            "folder, or make one: mh-pfedhn run quickstart."
        )
    raise ConfigError(
        unknown_name("run", name_or_path, known)
        + f" Give the path of a run folder, or its name under {output_root()}."
    )


def settle(folder: Path, status: str, reason: str, *, seed: int) -> None:
    """Write how a run ended into summary.json, where the server could not do it itself.

    A run that ended before it had written its config is known by its seed alone.
    """
    summary = read_json(folder / "summary.json")
    if summary.get("status") == status and summary.get("reason"):
        return  # the server said it better
    text = json.dumps({"seed": seed, **summary, "status": status, "reason": reason}, indent=2)
    replace_file(folder / "summary.json", text)


def process_mark(process: psutil.Process) -> dict[str, float]:
    """Name a process for a later session: its id, and when it started, for ids are used again."""
    return {"pid": process.pid, "started": process.create_time()}


def process_of(note: Mapping[str, Any]) -> psutil.Process | None:
    """Return the process that was noted, if it is still running and still the same."""
    mark = note.get("process") or {}
    try:
        process = psutil.Process(int(mark["pid"]))
        same = abs(process.create_time() - float(mark["started"])) < CLOCK_SLACK_S
    except (KeyError, ValueError, psutil.Error):
        return None
    return process if same and is_alive(process) else None


def client_order(client_id: str) -> tuple[int, int, str]:
    """Return the sort key of a client id: numbers by their value, before all others."""
    return (0, int(client_id), "") if client_id.isdecimal() else (1, 0, client_id)


def gain_of(clients: Iterable[ClientRow]) -> Gain | None:
    """Sum up what joining was worth to those of some clients that trained alone as well."""
    return Gain.of((c.num_test, c.accuracy - c.alone) for c in clients if c.alone is not None)


def _read_clients(path: Path) -> tuple[ClientRow, ...]:
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            ClientRow(
                r["client_id"],
                int(r["num_parameters"]),
                int(r["num_test"]),
                float(r["accuracy"]),
                float(r["accuracy_alone"]) if r.get("accuracy_alone") else None,
            )
            for r in csv.DictReader(file)
        ]
    return tuple(sorted(rows, key=lambda row: client_order(row.client_id)))


def _by_partition(config: Mapping[str, Any], clients: tuple[ClientRow, ...]) -> dict[str, str]:
    models, count = str(config.get("models", "")), int(config.get("num-partitions", 0))
    if not models:
        return {}
    if "," not in models:
        return {client.client_id: models.strip() for client in clients}
    if not all(c.client_id.isdecimal() and int(c.client_id) < count for c in clients):
        return {}
    from client_app.models.registry import model_for_partition  # imports torch: seconds

    return {c.client_id: model_for_partition(models, int(c.client_id), count) for c in clients}


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if usable else None
