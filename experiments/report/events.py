"""TensorBoard as an option: a run's rounds as event files, while it runs or afterwards.

The package `tensorboard` is not a dependency of the project and is imported only here, on demand.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from experiments.console import make_console, say
from experiments.report.runs import find_run
from experiments.run.progress import RowTail, polled

FOLDER = "tensorboard"
POLL_S = 1.0
GROUPS = {
    "accuracy": "accuracy", "test": "loss", "train": "loss", "bytes": "traffic",
    "seconds": "seconds", "num": "clients",
}  # fmt: skip


def add_tensorboard_parser(commands: Any) -> None:
    """Add `tensorboard` to the command line."""
    command = commands.add_parser("tensorboard")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their names")
    command.add_argument(
        "--logdir", default=FOLDER, metavar="DIR", help=f"where they go, default ./{FOLDER}"
    )
    command.set_defaults(command=convert)


def convert(args: argparse.Namespace) -> int:
    """Write the rounds of some runs as event files, a folder for each run."""
    require_tensorboard()
    logdir, console = Path(args.logdir).expanduser().absolute(), make_console()
    for name in args.runs:
        run = find_run(name)
        target = logdir / run.name
        for old in target.glob("events.out.tfevents.*"):
            old.unlink()  # a second conversion replaces the first
        with _writer(target) as writer:
            # the summary was written when the last round ended
            ended = (run.folder / "summary.json").stat().st_mtime if run.summary else None
            started = None if ended is None else ended - run.total("seconds_round")
            write_rows(writer, run.rows, started=started)
        say(console, f"{len(run.rows)} rounds  {target}")
    say(console, f"look  tensorboard --logdir {logdir}")
    return 0


@contextlib.contextmanager
def streamed(folder: Path) -> Iterator[None]:
    """Write a run's rounds as event files into its own folder while the block runs."""
    tail = RowTail(folder / "metrics.jsonl")
    with (
        _writer(folder / FOLDER) as writer,
        polled(lambda: write_rows(writer, tail.new_rows()), POLL_S),
    ):
        yield


def write_rows(
    writer: Any, rows: Sequence[Mapping[str, Any]], *, started: float | None = None
) -> None:
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


def _writer(target: Path) -> contextlib.closing[Any]:
    return contextlib.closing(require_tensorboard()(log_dir=str(target)))
