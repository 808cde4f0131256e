"""`mh-pfedhn rename`: a participant of a stopped run goes on under another client-id."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import MHpFedHNError, RunError
from common.files import is_shown_as_is, read_json, replace_file
from common.user_privacy import RELEASES
from experiments.console import make_console, say
from experiments.deploy.attendance import ATTENDANCE
from experiments.deploy.forget import held_checkpoint, opened_method
from experiments.report.runs import Run, find_run

Names = Mapping[str, str]


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
        tensors = {_tensor(name, names): x for name, x in checkpoint.tensors.items()}
        meta = {
            **meta,
            "learned": _learned(meta["learned"], names),
            "registry": _rows(meta["registry"], names),
            "clients": _rows(meta["clients"], names),
            "rejected": _keys(meta["rejected"], names),
        }
        try:
            opened_method(run, tensors, meta["learned"])
        except (LookupError, TypeError, ValueError, AttributeError, MHpFedHNError) as error:
            raise RunError(
                f"{old!r} cannot be renamed in {run.folder}: what comes of it cannot be loaded "
                f"({error}). Nothing has changed; let it keep its client-id."
            ) from error
        save_checkpoint(place, tensors=tensors, meta=meta, keep=1)
        _rename_rows(run.folder, names)


def _require_free(old: str, new: str, meta: dict[str, Any]) -> None:
    """Raise RunError where one of the names is, or ends, another that the checkpoint has."""
    known = {row["client_id"] for row in meta["registry"]}
    if new in known:
        raise RunError(f"{new!r} is a client of this run already. Choose another name.")
    if not 1 <= len(new) <= 200 or new[0] == "_" or not is_shown_as_is(new):
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


# --- where names stand: a client-id may be any other word of a checkpoint as well -----------------

_OF_CLIENT = re.compile(
    r"((?:adam\.\w+\.)?embeddings\.|(?:personal|alone|newest)\.|(?:momentum\.)?embedding\.)(.*)",
    re.DOTALL,
)


def _tensor(name: str, names: Names) -> str:
    """Return the name of a tensor, or of a parameter, with the client's new name."""
    found = _OF_CLIENT.fullmatch(name)
    return found[1] + names.get(found[2], found[2]) if found else name


def _keys(value: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {names.get(key, key): x for key, x in value.items()}


def _rows(rows: Iterable[Mapping[str, Any]], names: Names) -> list[dict[str, Any]]:
    return [{**row, "client_id": names.get(row["client_id"], row["client_id"])} for row in rows]


def _learned(learned: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return the facts of a method's state dict with the new name, whatever the method is."""

    def listed(clients: Iterable[str]) -> list[str]:
        return [names.get(client, client) for client in clients]

    def tensors(parameters: Iterable[str]) -> list[str]:
        return [_tensor(name, names) for name in parameters]

    def keys(value: Mapping[str, Any]) -> dict[str, Any]:
        return _keys(value, names)

    def applied(value: Mapping[str, Any] | None, **places: Callable[[Any], Any]) -> Any:
        return value and {**value, **{k: f(value[k]) for k, f in places.items() if k in value}}

    return dict(
        applied(
            learned,
            declared=keys,
            clients=listed,
            momenta=tensors,
            hypernet=partial(
                applied,
                groups=keys,
                clients=lambda pairs: [[names.get(client, client), size] for client, size in pairs],
                turns=keys,
                alone=listed,
                newest=listed,
            ),
            update=partial(applied, adam=tensors, releases=keys),
            norms=lambda groups: {group: keys(norms) for group, norms in groups.items()},
            frozen=partial(applied, clients=listed),
        )
    )


def _rename_rows(folder: Path, names: Names) -> None:
    if (path := folder / ATTENDANCE).is_file():
        found = read_json(path)
        people = _rows(found["participants"], names)
        replace_file(path, json.dumps({**found, "participants": people}))
    if (path := folder / RELEASES).is_file():
        replace_file(path, json.dumps(_keys(read_json(path), names)))
    if (path := folder / "clients.csv").is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            fields, rows = list(reader.fieldnames or ()), list(reader)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fields)
        writer.writeheader()
        writer.writerows(_rows(rows, names))
        replace_file(path, text.getvalue())
