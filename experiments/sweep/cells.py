"""What a cell's folder says about it: done, to be resumed, to be started anew, running."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from common.errors import RunError
from common.files import replace_file
from experiments.run.engines.processes import is_alive
from experiments.sweep.plan import Cell
from server_app.output.figures import read_json, read_rows

State = Literal["waiting", "running", "cut off", "failed", "completed"]

NOTE, CONSOLE, STATE_FOLDER = "cell.json", "console.log", "state"
CLOCK_SLACK_S = 2.0


@dataclass(frozen=True)
class Standing:
    """How far a cell has come, as its folder tells."""

    state: State
    server_round: int
    accuracy: float | None
    seconds: float
    reason: str = ""


def standing(cell: Cell) -> Standing:
    """Read how far a cell is; it runs where its process does, even if its sweep was killed."""
    rows = read_rows(cell.folder / "metrics.jsonl")
    summary = read_json(cell.folder / "summary.json")
    scored = [row["accuracy_micro"] for row in rows if "accuracy_micro" in row]
    seconds = sum(float(row.get("seconds_round", 0.0)) for row in rows)
    done = int(rows[-1]["round"]) if rows else 0
    accuracy = scored[-1] if scored else None
    note = read_note(cell.folder)
    state: State = "waiting"
    if summary.get("status") == "completed":
        state = "completed"
    elif process_of(note) is not None:
        state = "running"
    elif note.get("failed") or summary.get("status") == "failed":
        state = "failed"
    elif note:
        state = "cut off"
    reason = str(note.get("failed") or summary.get("reason") or "")
    return Standing(state, done, accuracy, seconds, reason)


def read_note(folder: Path) -> dict[str, Any]:
    """Return what the sweep noted about a cell; {} when it never started it."""
    try:
        return read_json(folder / NOTE)
    except ValueError:
        return {}


def write_note(cell: Cell, changes: Mapping[str, Any]) -> None:
    """Replace some keys of the cell's note."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    note = {**read_note(cell.folder), **changes}
    replace_file(cell.folder / NOTE, json.dumps(note, indent=2))


def identify(process: psutil.Process) -> dict[str, float]:
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


def make_ready(cell: Cell) -> bool:
    """Prepare a cell's folder for a start; return whether its run can be resumed.

    A run that was cut off before its first checkpoint starts anew: its rows are removed.

    Raises
    ------
    RunError
        The folder holds a run that no sweep started.
    """
    folder = cell.folder
    if not (folder / "metrics.jsonl").exists():
        return False
    if not read_note(folder).get("file"):
        raise RunError(
            f"{folder} holds a run that no sweep started ({NOTE} does not say so). Move it "
            "away, or give the sweep another output-dir."
        )
    from server_app.output.checkpoint import latest  # imports torch: seconds

    if latest(folder / "checkpoint") is not None:
        return True
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (NOTE, CONSOLE):
            path.unlink()
    return False


def slim(cell: Cell) -> None:
    """Drop what only resuming needs from a completed cell; its embeddings stay."""
    from experiments.report.embeddings import keep_embeddings

    if keep_embeddings(cell.folder):
        shutil.rmtree(cell.folder / "checkpoint", ignore_errors=True)
    for path in (cell.folder / STATE_FOLDER).glob("*/*@*.safetensors"):
        path.unlink(missing_ok=True)


def keep_newest(cell: Cell) -> None:
    """Drop a completed cell's checkpoints but the newest whole one, which others go on from."""
    from server_app.output.checkpoint import latest  # imports torch: seconds

    newest = latest(cell.folder / "checkpoint")
    for path in (cell.folder / "checkpoint").glob("checkpoint-*"):
        if newest is not None and path != newest:
            shutil.rmtree(path, ignore_errors=True)
