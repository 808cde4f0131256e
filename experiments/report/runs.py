"""Read a run folder: config.json, metrics.jsonl, clients.csv, summary.json (design.md, Outputs)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from common.errors import ConfigError, RunError, unknown_name
from common.files import replace_file
from server_app.output.figures import read_json, read_rows
from server_app.output.run_folder import DEFAULT_ROOT

ROOT_VARIABLE = "MH_PFEDHN_RUNS"


@dataclass(frozen=True)
class ClientRow:
    """One line of clients.csv: a client's newest evaluation."""

    client_id: str
    num_parameters: int
    num_train: int
    num_test: int
    accuracy: float

    @classmethod
    def parse(cls, row: Mapping[str, str]) -> Self:
        """Build it from the text columns; other columns are left alone."""
        return cls(
            client_id=row["client_id"],
            num_parameters=int(row["num_parameters"]),
            num_train=int(row["num_train"]),
            num_test=int(row["num_test"]),
            accuracy=float(row["accuracy"]),
        )


@dataclass(frozen=True)
class Run:
    """What a run left on disk. Parts that were never written are empty."""

    folder: Path
    config: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    clients: tuple[ClientRow, ...]
    summary: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run folder.

        Raises
        ------
        RunError
            The folder holds no run, or a file in it cannot be understood.
        """
        if not any((folder / name).is_file() for name in ("summary.json", "metrics.jsonl")):
            raise RunError(
                f"{folder} holds no run: neither summary.json nor metrics.jsonl is in it."
            )
        try:
            return cls(
                folder=folder,
                config=read_json(folder / "config.json"),
                rows=tuple(read_rows(folder / "metrics.jsonl")),
                clients=_read_clients(folder / "clients.csv"),
                summary=read_json(folder / "summary.json"),
            )
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"run folder {folder} cannot be read: {type(error).__name__}: {error}."
            ) from error

    @property
    def name(self) -> str:
        """The name by which `show` finds the run: its folder's."""
        return self.folder.name

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


def output_root() -> Path:
    """Return the folder that holds run folders: $MH_PFEDHN_RUNS, or one below the user's home."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser().absolute()


def new_folder(name: str) -> Path:
    """Return a path for a new run: the name and the time, below the output root."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (output_root() / (stem + end) for end in ("", *(f"-{i}" for i in range(2, 100))))
    return next(path for path in candidates if not path.exists())


def find_run(name_or_path: str) -> Run:
    """Load a run by its folder's path, or by its name under the output root.

    Raises
    ------
    RunError, ConfigError
        There is no such run, or its folder cannot be read.
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


def _read_clients(path: Path) -> tuple[ClientRow, ...]:
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        rows = [ClientRow.parse(row) for row in csv.DictReader(file)]
    return tuple(sorted(rows, key=lambda row: _natural(row.client_id)))


def _natural(client_id: str) -> tuple[int, int, str]:
    return (0, int(client_id), "") if client_id.isdecimal() else (1, 0, client_id)


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
