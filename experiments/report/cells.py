"""What a cell's folder says about it, how it is made ready for a run, and what is kept of one."""

from __future__ import annotations

import json
import shlex
import shutil
from typing import Any

from common.errors import RunError
from common.files import read_json, replace_file
from experiments.report.plan import Cell, Plan
from experiments.report.runs import NOTE, Run
from server_app.output.checkpoint import latest

CONSOLE = "console.log"


def state_of(found: Run) -> str:
    """Return how far a cell is: waiting, running, cut off, failed or completed."""
    if found.status in ("completed", "running"):
        return found.status
    if found.note.get("failed") or found.status == "failed":
        return "failed"
    return "cut off" if found.note else "waiting"


def reason_of(found: Run) -> str:
    """Return why a cell failed."""
    return str(found.note.get("failed") or found.summary.get("reason") or "")


def write_note(cell: Cell, **changes: Any) -> None:
    """Replace some keys of the cell's note, which is what a sweep knows of it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    note = {**read_json(cell.folder / NOTE), **changes}
    replace_file(cell.folder / NOTE, json.dumps(note, indent=2))


def make_ready(cell: Cell, plan: Plan) -> bool:
    """Prepare a cell's folder for a start; return whether its run can be resumed.

    A run that was cut off before its first checkpoint starts anew: its rows are removed. Raises
    RunError where the folder holds a run that no sweep started, or where the cell that this one
    goes on from has not completed.
    """
    folder, found = cell.folder, Run.read(cell.folder)
    if found.rows and not found.note.get("file"):
        raise RunError(
            f"{folder} holds a run that no sweep started ({NOTE} does not say so). Move it away, "
            "or give the sweep another output-dir."
        )
    if cell.after and Run.read(cell.after).status != "completed":
        raise RunError(
            f"{cell.name} goes on from {cell.after.name}, which did not complete. Look at its "
            "run.log; the same command tries both again."
        )
    resume = latest(folder / "checkpoint") is not None
    stale = folder.iterdir() if found.note.get("file") and not resume else ()
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (NOTE, CONSOLE):
            path.unlink()
    write_note(
        cell, sweep=plan.file.stem, file=str(plan.file), variant=cell.variant, grid=cell.grid,
        seed=cell.seed, command=shlex.join(["mh-pfedhn", *cell.arguments(place=False)]), failed="",
        resumed_after=[*found.note.get("resumed_after", []), found.rounds_done] if resume else [],
    )  # fmt: skip
    return resume


def tidy(cell: Cell, *, keep: bool) -> None:
    """Drop what only resuming needs from a completed cell.

    `keep` leaves the newest whole checkpoint, which others go on from; else embeddings stay.
    """
    from experiments.report.embeddings import keep_embeddings

    checkpoints = cell.folder / "checkpoint"
    if keep:
        newest = latest(checkpoints)
        for path in checkpoints.glob("checkpoint-*") if newest else ():
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)
        return
    if keep_embeddings(cell.folder):
        shutil.rmtree(checkpoints, ignore_errors=True)
    for path in (cell.folder / "state").glob("*/*@*.safetensors"):
        path.unlink(missing_ok=True)
