"""`mh-pfedhn rename`: a participant of a stopped run goes on under another client-id."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import read_json, replace_file
from experiments.console import make_console, say
from experiments.deploy.attendance import ATTENDANCE
from experiments.deploy.forget import held_checkpoint
from experiments.report.runs import Run, find_run

Rename = Callable[[str], str]


def add_rename_parser(commands: Any) -> None:
    """Add `rename` to the command line."""
    command = commands.add_parser("rename")
    command.add_argument("run", metavar="RUN", help="a run folder, or its name")
    command.add_argument("old", metavar="OLD", help="its client-id")
    command.add_argument("new", metavar="NEW", help="its client-id from now on")
    command.set_defaults(command=run_rename)


def run_rename(args: argparse.Namespace) -> int:
    """Write a checkpoint with the other name, and say what the participant has to do."""
    run = find_run(args.run)
    rename(run, args.old, args.new)
    say(
        make_console(),
        f"{args.old} is {args.new} in {run.folder}, with its embedding, its weights and its key. "
        f"The participant sets client-id = {args.new!r}, and renames its folder below the "
        f"state-dir: mv STATE/{args.old} STATE/{args.new}",
    )
    return 0


def rename(run: Run, old: str, new: str) -> None:
    """Give a participant of a run's newest checkpoint another name, and its rows.

    Raises RunError where a server is writing to the folder, the run does not know the participant,
    the new name is taken, or either stands for something else; CheckpointError where there is no
    whole checkpoint.
    """
    from server_app.methods.mhpfedhn import common_id
    from server_app.output.checkpoint import save_checkpoint

    with held_checkpoint(run, old) as (place, checkpoint):
        meta = checkpoint.meta
        _require_free(old, new, meta)
        names = {old: new, common_id(old): common_id(new)}

        def renamed(text: str) -> str:
            for name, other in names.items():
                if text == name or text.endswith(f".{name}"):  # of a tensor
                    return text.removesuffix(name) + other
            return text

        tensors = {renamed(name): x for name, x in checkpoint.tensors.items()}
        parts = {key: meta[key] for key in ("learned", "registry", "clients", "rejected")}
        meta = {**meta, **_everywhere(parts, renamed)}
        save_checkpoint(place, tensors=tensors, meta=meta, keep=1)
        _rename_rows(run.folder, renamed)


def _require_free(old: str, new: str, meta: dict[str, Any]) -> None:
    """Raise RunError where one of the names is, or ends, another that the checkpoint has."""
    known = {row["client_id"] for row in meta["registry"]}
    if new in known:
        raise RunError(f"{new!r} is a client of this run already. Choose another name.")
    if not new or not new.isprintable() or new[0] in "=+-@_" or len(new) > 200:
        raise RunError(f"{new!r} is no client-id: 1 to 200 characters that can be shown.")
    others = {*known - {old}, *_group_keys(meta["learned"])}
    for name in (old, new):
        for other in others:
            if other == name or other.endswith((f".{name}", f"-{name}")):
                raise RunError(f"{name!r} also stands for {other!r} in this run.")


def _group_keys(learned: Any) -> set[str]:
    """Return the keys of head groups and of groups of equal models."""
    found = {*learned.get("models", {})} | {*map(str, learned.get("declared", {}).values())}
    network = learned.get("hypernet", {})
    return found | {*network.get("heads", {})} | {*map(str, network.get("groups", {}).values())}


def _everywhere(value: Any, renamed: Rename) -> Any:
    """Return JSON with the name changed wherever it stands by itself, as a key or as a value."""
    if isinstance(value, dict):
        return {renamed(key): _everywhere(x, renamed) for key, x in value.items()}
    if isinstance(value, list):
        return [_everywhere(x, renamed) for x in value]
    return renamed(value) if isinstance(value, str) else value


def _rename_rows(folder: Path, renamed: Rename) -> None:
    if (path := folder / ATTENDANCE).is_file():
        replace_file(path, json.dumps(_everywhere(read_json(path), renamed)))
    if (path := folder / "clients.csv").is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or ()), list(reader)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=names)
        writer.writeheader()
        writer.writerows({**row, "client_id": renamed(row["client_id"])} for row in rows)
        replace_file(path, text.getvalue())
