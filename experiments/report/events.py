"""TensorBoard as an option: a run's rounds as event files, while it runs or afterwards.

The package `tensorboard` is not a dependency of the project and is imported only here, on demand.
"""

from __future__ import annotations

import argparse
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError
from experiments.report.runs import find_run
from experiments.run.progress import RowTail
from server_app.output.figures import read_json

FOLDER = "tensorboard"
POLL_S = 1.0
GROUPS = {
    "accuracy": "accuracy",
    "test": "loss",
    "train": "loss",
    "bytes": "traffic",
    "seconds": "seconds",
    "num": "clients",
}


def add_tensorboard_parser(commands: Any) -> None:
    """Add `tensorboard` to the command line."""
    command = commands.add_parser("tensorboard", help="write runs as TensorBoard event files")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their names")
    command.add_argument(
        "--logdir", default=FOLDER, metavar="DIR", help=f"where they go, default ./{FOLDER}"
    )
    command.set_defaults(command=convert)


def convert(args: argparse.Namespace) -> int:
    """Write the rounds of some runs as event files, a folder for each run."""
    require_tensorboard()
    logdir, console = Path(args.logdir).expanduser().absolute(), Console(width=140)
    for name in args.runs:
        run = find_run(name)
        target = logdir / run.name
        for old in target.glob("events.out.tfevents.*"):
            old.unlink()  # a second conversion replaces the first
        with _writer(target) as writer:
            write_rows(writer, list(run.rows), started=_started(run.folder, run.rows))
        console.print(f"{len(run.rows)} rounds  {target}", highlight=False, soft_wrap=True)
    console.print(f"look  tensorboard --logdir {logdir}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def streamed(folder: Path) -> Iterator[None]:
    """Write a run's rounds as event files into its own folder while the block runs.

    Raises
    ------
    ConfigError
        TensorBoard is not installed; before anything runs.
    """
    require_tensorboard()
    done, target = threading.Event(), folder / FOLDER
    thread = threading.Thread(target=_stream, args=(folder, target, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_rows(writer: Any, rows: list[Mapping[str, Any]], *, started: float | None = None) -> None:
    """Write every number of some rows under a readable name, by round.

    `started` (seconds since 1970) puts the rounds at the time at which they happened.
    """
    spent = 0.0
    for row in rows:
        spent += float(row.get("seconds_round", 0.0))
        when = None if started is None else started + spent
        for key, value in row.items():
            if key != "round" and isinstance(value, (int, float)) and math.isfinite(value):
                writer.add_scalar(tag(key), value, int(row["round"]), walltime=when)
    writer.flush()


def tag(key: str) -> str:
    """Return the name of a column in TensorBoard: its group, and its own.

    >>> tag("accuracy_micro"), tag("grad_norm")
    ('accuracy/accuracy_micro', 'server/grad_norm')
    """
    return f"{GROUPS.get(key.partition('_')[0], 'server')}/{key}"


def require_tensorboard() -> Any:
    """Return torch's SummaryWriter; raise ConfigError that says what to install if missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "TensorBoard is not installed, and only --tensorboard and `mh-pfedhn tensorboard` need "
            "it. Install it beside this project: `uv sync --extra tensorboard`, or `pip install "
            "tensorboard`. Everything else works without: metrics.jsonl has the same numbers."
        ) from error
    return SummaryWriter


@contextmanager
def _writer(target: Path) -> Iterator[Any]:
    writer = require_tensorboard()(log_dir=str(target))
    try:
        yield writer
    finally:
        writer.close()


def _stream(folder: Path, target: Path, done: threading.Event) -> None:
    tail = RowTail(folder / "metrics.jsonl")
    with _writer(target) as writer:
        last = False
        while not last:
            last = done.wait(POLL_S)  # once more after the end: the last round's row
            if rows := tail.new_rows():
                write_rows(writer, list(rows))


def _started(folder: Path, rows: tuple[Mapping[str, Any], ...]) -> float | None:
    """Estimate when a run started: its summary was written when its last round ended."""
    if not read_json(folder / "summary.json"):
        return None
    ended = (folder / "summary.json").stat().st_mtime
    return ended - sum(float(row.get("seconds_round", 0.0)) for row in rows)
