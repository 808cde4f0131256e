"""`mh-pfedhn forget`: take a participant out of a run that has stopped."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from common.config import RunConfig
from common.errors import ConfigError, RunError, listing
from common.files import read_json, replace_file, safe_name
from common.methods import method_class
from experiments.console import make_console, say
from experiments.deploy.attendance import ATTENDANCE
from experiments.report.runs import Run, find_run

if TYPE_CHECKING:
    from torch import Tensor

    from server_app.methods.base import Method
    from server_app.output.checkpoint import Checkpoint


def add_forget_parser(commands: Any) -> None:
    """Add `forget` to the command line."""
    command = commands.add_parser("forget")
    command.add_argument("run", metavar="RUN", help="a run folder, or its name")
    command.add_argument("client", metavar="CLIENT", help="its client-id")
    command.add_argument(
        "--key", action="store_true", help="only its key: it comes with another one from now on"
    )
    command.set_defaults(command=run_forget)


def run_forget(args: argparse.Namespace) -> int:
    """Write a checkpoint without the participant, or without its key; drop the others."""
    run = find_run(args.run)
    if args.key:
        forget_key(run, args.client)
        say(make_console(), f"{args.client} belongs to the next key that comes with its name.")
        return 0
    forget(run, args.client)
    say(
        make_console(),
        f"{args.client} is forgotten in {run.folder}: embedding, own weights, registration, key, "
        "rows. What all share was learned from its updates too, and stays; so do pictures that "
        "were drawn, and copies elsewhere.",
    )
    return 0


def forget(run: Run, client_id: str) -> None:
    """Take a participant out of a run's checkpoint, clients.csv and personal models.

    Raises RunError where a server is writing to the folder or the run does not know the
    participant, CheckpointError where there is no whole checkpoint.
    """
    from server_app.output.checkpoint import save_checkpoint

    with held_checkpoint(run, client_id) as (place, checkpoint):
        meta = checkpoint.meta
        method = opened_method(run, checkpoint.tensors, meta["learned"])
        method.forget_client(client_id)
        tensors, learned = method.state_dict()
        without = {
            "learned": learned,
            "registry": [row for row in meta["registry"] if row["client_id"] != client_id],
            "clients": [row for row in meta["clients"] if row["client_id"] != client_id],
            "rejected": {k: n for k, n in meta["rejected"].items() if k != client_id},
        }
        save_checkpoint(place, tensors=tensors, meta={**meta, **without}, keep=1)
        _drop_row(run.folder / "clients.csv", client_id)
        _drop_attendance(run.folder / ATTENDANCE, client_id)
        with suppress(ConfigError):  # a name that cannot be a folder's has none
            models = run.folder / "personal-models" / safe_name(client_id)
            shutil.rmtree(models, ignore_errors=True)


def forget_key(run: Run, client_id: str) -> None:
    """Let a participant come with another key: its client-id is bound to the next that claims it.

    Raises as `forget`.
    """
    from server_app.output.checkpoint import save_checkpoint

    with held_checkpoint(run, client_id) as (place, checkpoint):
        meta = checkpoint.meta
        registry = [
            {**row, "key": ""} if row["client_id"] == client_id else row for row in meta["registry"]
        ]
        meta = {**meta, "registry": registry}
        save_checkpoint(place, tensors=checkpoint.tensors, meta=meta, keep=1)


def opened_method(
    run: Run, tensors: Mapping[str, Tensor], learned: Mapping[str, Any]
) -> Method[Any]:
    """Return a run's method with what a checkpoint has of it; raises what does not fit there."""
    config = RunConfig.parse(run.config)
    kind: type[Method[Any]] = method_class(config.run.method, "server_app")
    method = kind(kind.adapted(config))
    method.load_state_dict(tensors, learned)
    return method


@contextmanager
def held_checkpoint(run: Run, client_id: str) -> Iterator[tuple[Path, Checkpoint]]:
    """Hold a run's folder and open its newest checkpoint, which has to know the participant."""
    from server_app.app import CHECKPOINTS
    from server_app.output.checkpoint import load_checkpoint
    from server_app.output.run_folder import LOCK

    lock = FileLock(run.folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"a server is writing to {run.folder}. Stop it first.") from error
    try:
        place = run.folder / CHECKPOINTS
        checkpoint = load_checkpoint(place)
        known = [row["client_id"] for row in checkpoint.meta["registry"]]
        if client_id not in known:
            raise RunError(f"{run.folder} knows no {client_id!r}, only {listing(known, 20)}.")
        yield place, checkpoint
    finally:
        lock.release()


def _drop_attendance(path: Path, client_id: str) -> None:
    if path.is_file():
        found = read_json(path)
        kept = [row for row in found["participants"] if row["client_id"] != client_id]
        replace_file(path, json.dumps({**found, "participants": kept, "refused": []}))


def _drop_row(path: Path, client_id: str) -> None:
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names, rows = list(reader.fieldnames or ()), list(reader)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(row for row in rows if row["client_id"] != client_id)
    replace_file(path, text.getvalue())
