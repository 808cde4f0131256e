"""Run the cells of a sweep, each in a process of its own, and carry on where it was cut off."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil
from filelock import FileLock, Timeout

from common.errors import RunError
from common.files import replace_file
from experiments.run.engines.processes import Process, is_alive, start
from experiments.run.progress import RowTail
from experiments.sweep import cells
from experiments.sweep.cells import STATE_FOLDER, identify, standing, write_note
from experiments.sweep.display import Display
from experiments.sweep.plan import Cell, Plan
from server_app.output.figures import read_json

LOCK, HOLDER = ".sweep.lock", ".sweep.json"
POLL_S = 0.25
STOP_PATIENCE_S = 30.0

Command = Callable[[Cell, bool], Sequence[str]]


def cell_command(cell: Cell, resume: bool) -> list[str]:
    """Return the command that runs a cell: this interpreter, the project's own command line."""
    arguments = cell.arguments(resume=resume)
    if "state-dir" not in cell.settings:  # what clients keep must outlive the process: resuming
        pair = f"state-dir={cell.folder / STATE_FOLDER}"
        arguments += [pair] if "--set" in arguments else ["--set", pair]
    return [sys.executable, "-m", "experiments", *arguments]


@dataclass
class Active:
    """A cell that is running, in our process or in one that an earlier, killed sweep left."""

    cell: Cell
    process: psutil.Process
    child: Process | None
    tail: RowTail
    started: float

    @property
    def ended(self) -> bool:
        """Whether its process has ended; a child of ours is reaped."""
        return self.child.poll() is not None if self.child else not is_alive(self.process)


class Runner:
    """Runs what is left of a plan.

    Parameters
    ----------
    command
        Builds the command line of a cell, given whether to resume; tests put a cheaper one.
    """

    def __init__(
        self, plan: Plan, display: Display, *, jobs: int = 1, command: Command = cell_command
    ) -> None:
        self._plan = plan
        self._display = display
        self._jobs = jobs
        self._command = command
        self._active: list[Active] = []
        self._failed: list[Cell] = []

    def run(self) -> list[Cell]:
        """Run all cells that are not completed; return those that failed.

        Raises
        ------
        RunError
            Another sweep is at work in the folder.
        KeyboardInterrupt
            Passed on after the running cells have been stopped in order.
        """
        with own(self._plan.folder):
            queue = [c for c in self._plan.cells if standing(c).state != "completed"]
            self._display.begin(self._plan.cells)
            try:
                while queue or self._active:
                    while len(self._active) < self._jobs and (cell := self._next(queue)):
                        self._begin(cell)
                    self._look()
                    sleep(POLL_S)
            finally:
                self._stop()
                self._display.end()
        return self._failed

    def _next(self, queue: list[Cell]) -> Cell | None:
        """Take the first cell that need not wait for another one of this sweep."""
        busy = {cell.folder for cell in [*queue, *(active.cell for active in self._active)]}
        for place, cell in enumerate(queue):
            if cell.after not in busy:
                return queue.pop(place)
        return None

    def _begin(self, cell: Cell) -> None:
        found = cells.process_of(cells.read_note(cell.folder))
        tail = RowTail(cell.folder / "metrics.jsonl")
        if found is not None:
            self._display.started(cell, "found running, followed")
            self._active.append(Active(cell, found, None, tail, monotonic()))
            return
        try:
            _require_source(cell)
            resume = cells.make_ready(cell)
            child = self._start(cell, resume)
        except RunError as error:
            write_note(cell, {"failed": str(error)})
            self._fail(cell)
            return
        self._display.started(cell, "resumed" if resume else "started")
        process = psutil.Process(child.pid)
        write_note(cell, {"process": identify(process)})
        self._active.append(Active(cell, process, child, tail, monotonic()))

    def _start(self, cell: Cell, resume: bool) -> Process:
        note = cells.read_note(cell.folder)
        resumed = [*note.get("resumed_after", [])]
        if resume:
            resumed.append(standing(cell).server_round)
        facts = {
            "sweep": self._plan.file.stem,
            "file": str(self._plan.file),
            "variant": cell.variant,
            "grid": cell.grid,
            "seed": cell.seed,
            "command": shlex.join(["mh-pfedhn", *cell.arguments(place=False)]),
            "resumed_after": resumed if resume else [],
            "failed": "",
        }
        write_note(cell, facts)
        log = cell.folder / cells.CONSOLE
        return start(self._command(cell, resume), env=_environment(), log=log, cwd=Path.cwd())

    def _look(self) -> None:
        for active in list(self._active):
            ended = active.ended
            for row in active.tail.new_rows():
                self._display.advanced(active.cell, row)
            if ended:
                self._active.remove(active)
                self._close(active)

    def _close(self, active: Active) -> None:
        now = standing(active.cell)
        if now.state == "completed":
            write_note(active.cell, {"failed": ""})
            tidy = cells.keep_newest if self._plan.keep_checkpoints else cells.slim
            tidy(active.cell)
            self._display.finished(active.cell, now)
            return
        if not now.reason or now.state != "failed":
            code = active.child.returncode if active.child else None
            write_note(active.cell, {"failed": _last_words(active.cell.folder, code)})
        self._fail(active.cell)

    def _fail(self, cell: Cell) -> None:
        self._failed.append(cell)
        self._display.finished(cell, standing(cell))

    def _stop(self) -> None:
        """End what still runs: asked first, so that every run says that it was interrupted."""
        for active in self._active:
            with contextlib.suppress(psutil.Error):
                active.process.terminate()
        psutil.wait_procs([a.process for a in self._active], timeout=STOP_PATIENCE_S)
        for active in self._active:
            if not active.ended:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(active.process.pid, signal.SIGKILL)
            if active.child:
                active.child.wait()
        self._active.clear()


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Own a sweep's folder; another sweep on it is refused.

    Raises
    ------
    RunError
        A sweep is at work here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pid = holder(folder) or "?"
        raise RunError(
            f"another sweep (process {pid}) is at work in {folder}. Look at it with --status; "
            f"stop it with `kill {pid}`: a later sweep goes on where it was."
        ) from None
    try:
        mark = {"process": identify(psutil.Process())}
        replace_file(folder / HOLDER, json.dumps(mark))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> int | None:
    """Return the process id of the sweep that is at work in a folder, or None."""
    try:
        process = cells.process_of(read_json(folder / HOLDER))
    except ValueError:
        return None
    return process.pid if process else None


def _environment() -> dict[str, str]:
    """Return the surroundings of a cell: this copy of the project must be the one that runs."""
    root = str(Path(__file__).parents[2])
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def _last_words(folder: Path, code: int | None) -> str:
    from experiments.run.launch import error_lines

    lines = error_lines(folder / cells.CONSOLE, limit=3)
    return f"ended with exit status {code}: {' '.join(lines) or 'no output'}"


def detach(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the sweep again as a process that outlives this terminal, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments", "sweep", *arguments]
    return start(command, env=_environment(), log=log, cwd=Path.cwd())


def _require_source(cell: Cell) -> None:
    """Raise RunError unless the cell that this one goes on from has completed, or there is none."""
    if cell.after is None:
        return
    summary = cell.after / "summary.json"
    if not summary.exists() or json.loads(summary.read_text()).get("status") != "completed":
        raise RunError(
            f"{cell.name} goes on from {cell.after.name}, which did not complete. Look at its "
            "run.log; the same command tries both again."
        )
