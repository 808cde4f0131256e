"""A run's rounds in TensorBoard, Weights & Biases or MLflow, while it runs or afterwards.

None of the three is a dependency of the project: each is imported only here, on demand. Whatever
is written lies below the run's folder, and nothing leaves the machine, unless a library's own
variable says otherwise: `WANDB_MODE`, `MLFLOW_TRACKING_URI`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol

from common.errors import ConfigError
from common.files import read_json
from experiments.console import make_console, say
from experiments.report.runs import Run, find_run
from experiments.run.progress import RowTail, polled

PROJECT = "mh-pfedhn"
POLL_S = 1.0
MOST_PARAMS = 100
"""Parameters that MLflow takes in one call."""
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""Keeps the libraries from telling their makers of their use, where the user has not chosen."""
WANDB_SETTINGS = {
    "silent": True, "console": "off", "disable_git": True, "x_disable_stats": True,
    "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip
"""A run's numbers and its config: nothing of the machine, its packages or the folder's history."""
GROUPS = {
    "accuracy": "accuracy", "test": "loss", "train": "loss", "bytes": "traffic",
    "seconds": "seconds", "num": "clients",
}  # fmt: skip


class Tracker(Protocol):
    """Where a run's numbers go. `look` says how to see them."""

    module: ClassVar[str]
    package: ClassVar[str]
    look: str

    def __init__(self, library: Any, run: Run, started: float) -> None:
        """Begin with the run's config; `started` in seconds since 1970."""

    def write(self, values: Mapping[str, float], step: int, when: float) -> None:
        """Write a round's numbers under their names."""

    def close(self, status: str) -> None:
        """End, with the run's status as in summary.json."""


class TensorBoard:
    """Event files, and the config as hyperparameters."""

    module: ClassVar[str] = "torch.utils.tensorboard"
    package: ClassVar[str] = "tensorboard"

    def __init__(self, library: Any, run: Run, started: float) -> None:
        folder = run.folder / self.package
        self.look = f"tensorboard --logdir {folder}"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = library.SummaryWriter(log_dir=str(folder))
        plain = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in run.config.items()
        }
        hparams = import_module(self.module + ".summary").hparams
        for summary in hparams(plain, {tag("accuracy_micro"): 0.0}):  # the name alone is written
            self._writer.file_writer.add_summary(summary)

    def write(self, values: Mapping[str, float], step: int, when: float) -> None:
        """Write a round's numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)
        self._writer.flush()

    def close(self, status: str) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """An offline run of Weights & Biases, to be sent by `wandb sync`; `WANDB_MODE` wins."""

    module: ClassVar[str] = "wandb"
    package: ClassVar[str] = "wandb"

    def __init__(self, library: Any, run: Run, started: float) -> None:
        self.look = f"wandb sync {run.folder / self.package}/offline-run-*"
        shutil.rmtree(run.folder / self.package, ignore_errors=True)
        self._library = library
        self._run = library.init(
            mode=os.environ.get("WANDB_MODE", "offline"),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            dir=str(run.folder),  # it adds a folder `wandb`
            config=dict(run.config),
            settings=library.Settings(**WANDB_SETTINGS),
        )

    def write(self, values: Mapping[str, float], step: int, when: float) -> None:
        """Write a round's numbers."""
        self._run.log({**values, "_timestamp": when}, step=step)

    def close(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=int(status != "completed"))
        self._library.teardown()  # waits until the file is whole


class MLflow:
    """A run in a SQLite file, the config as its parameters; `MLFLOW_TRACKING_URI` wins."""

    module: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "mlflow-skinny"
    ENDS: ClassVar[Mapping[str, str]] = {"completed": "FINISHED", "failed": "FAILED"}

    def __init__(self, library: Any, run: Run, started: float) -> None:
        folder = run.folder / self.module
        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        uri = elsewhere or f"sqlite:///{folder / 'mlflow.db'}"
        self.look = f"mlflow ui --backend-store-uri {uri}"
        if not elsewhere:
            folder.mkdir(parents=True, exist_ok=True)
        self._entities, self._ended = library.entities, started
        self._client = library.MlflowClient(tracking_uri=uri)
        experiment = self._experiment(None if elsewhere else (folder / "artifacts").as_uri())
        if not elsewhere:
            for old in self._client.search_runs([experiment]):
                self._client.delete_run(old.info.run_id)
        made = self._client.create_run(experiment, run_name=run.name, start_time=_ms(started))
        self._id = made.info.run_id
        params = [library.entities.Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])

    def write(self, values: Mapping[str, float], step: int, when: float) -> None:
        """Write a round's numbers."""
        self._ended = when
        kind, at = self._entities.Metric, _ms(when)
        metrics = [kind(name, value, at, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: str) -> None:
        """End the run."""
        end = self.ENDS.get(status, "KILLED")
        self._client.set_terminated(self._id, end, end_time=_ms(self._ended))

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(
            found.experiment_id if found else self._client.create_experiment(name, artifacts)
        )


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def add_track_parser(commands: Any) -> None:
    """Add `track` to the command line."""
    command = commands.add_parser("track")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their names")
    command.add_argument("--to", choices=TRACKERS, required=True, help="written into RUN/NAME")
    command.set_defaults(command=track)


def track(args: argparse.Namespace) -> int:
    """Write the rounds of some runs for a tracker, each below its own folder."""
    require(args.to)
    console = make_console()
    for run in [find_run(name) for name in args.runs]:
        when = run.changed_at() - run.total("seconds_round")
        tracker = open_tracker(args.to, run, when)
        for row in run.rows:
            when += float(row.get("seconds_round", 0.0))
            write_row(tracker, row, when)
        tracker.close(run.status)
        say(console, f"{len(run.rows)} rounds  {tracker.look}")
    return 0


@contextlib.contextmanager
def tracked(name: str | None, run: Run) -> Iterator[list[str]]:
    """Write a run's rounds for a tracker, if there is one, while the block runs.

    Yields lines for the user, complete after the block: where to look, or why tracking stopped. It
    never stops the run.
    """
    lines: list[str] = []
    if name is None:
        yield lines
        return
    tail, tracker = RowTail(run.folder / "metrics.jsonl"), open_tracker(name, run, time.time())

    def guarded(step: Callable[..., None], *given: Any) -> None:
        try:
            if not lines:
                step(*given)
        except Exception as error:  # a library's own: a full disk, a server that is gone
            lines.append(f"{name} stopped ({type(error).__name__}: {error}).")
            lines.append(f"All rounds: mh-pfedhn track {run.folder} --to {name}")

    def look() -> None:
        for row in tail.new_rows():
            guarded(write_row, tracker, row, time.time())

    try:
        with polled(look, POLL_S):
            yield lines
    finally:
        status = read_json(run.folder / "summary.json").get("status", "failed")
        guarded(tracker.close, str(status))
        lines[:] = lines or [tracker.look]


def open_tracker(name: str, run: Run, started: float) -> Tracker:
    """Begin a tracker below the run's folder; what it wrote there before is replaced.

    Raises ConfigError where its library is missing or refuses.
    """
    library = require(name)
    place = run.folder / name
    if place.is_symlink():  # in a folder that was handed over, to anywhere
        place.unlink()
    try:
        return TRACKERS[name](library, run, started)
    except Exception as error:  # a library's own
        raise ConfigError(
            f"{name} cannot begin a run ({type(error).__name__}: {error}). Without WANDB_MODE and "
            "MLFLOW_TRACKING_URI all is written below the run's folder."
        ) from error


def write_row(tracker: Tracker, row: Mapping[str, Any], when: float) -> None:
    """Write every number of a row under a readable name; `when` in seconds since 1970."""
    numbers = {
        tag(key): float(value)
        for key, value in row.items()
        if key != "round" and isinstance(value, (int, float)) and math.isfinite(value)
    }
    tracker.write(numbers, int(row["round"]), when)


def tag(key: str) -> str:
    """Return the name of a column in a tracker: its group, and its own.

    >>> tag("accuracy_micro"), tag("grad_norm")
    ('accuracy/accuracy_micro', 'server/grad_norm')
    """
    return f"{GROUPS.get(key.partition('_')[0], 'server')}/{key}"


def require(name: str) -> Any:
    """Return a tracker's library; raise ConfigError that says what to install if missing."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return import_module(TRACKERS[name].module)
    except ImportError as error:
        raise ConfigError(
            f"{name} is not installed, and only `--track {name}` and `mh-pfedhn track --to {name}` "
            f"need it. Install it beside this project: `uv sync --extra {name}`, or `pip install "
            f"{TRACKERS[name].package}`. Everything else works without: metrics.jsonl has the same "
            f"numbers. ({error})"
        ) from error


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
