"""Run the cells of a sweep, each in a process of its own, and go on where it was cut off.

What a sweep knows is in the cells' folders: what the runs themselves write, and a cell.json each.
So a killed sweep loses nothing: its cells run on, and the next sweep follows them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from common.errors import RunError
from common.files import read_json, replace_file
from experiments.console import say
from experiments.report.cells import CONSOLE, make_ready, reason_of, state_of, tidy, write_note
from experiments.report.listing import table_of
from experiments.report.plan import Cell, Plan
from experiments.report.runs import Run, process_mark, process_of
from experiments.report.terminal import percent
from experiments.run.engines.processes import Process, is_alive, start
from experiments.run.interrupts import terminate_as_interrupt
from experiments.run.launch import error_lines
from experiments.run.progress import clock

FAILED, INTERRUPTED = 1, 130
LOCK, HOLDER, LOG = ".sweep.lock", ".sweep.json", "sweep.log"
POLL_S, LINE_EVERY_S, STOP_PATIENCE_S = 0.25, 60.0, 30.0
COLOURS = {"completed": "green", "running": "cyan", "failed": "bold red", "cut off": "yellow"}

Command = Callable[[Cell, bool], Sequence[str]]
"""Builds the command line of a cell, given whether to resume."""


@dataclass
class Active:
    """A cell that is running, in our process or in one that an earlier, killed sweep left."""

    cell: Cell
    process: psutil.Process
    child: Process | None
    said: float

    @property
    def ended(self) -> bool:
        """Whether its process has ended; a child of ours is reaped."""
        return self.child.poll() is not None if self.child else not is_alive(self.process)


def cell_command(cell: Cell, resume: bool) -> list[str]:
    """Return the command that runs a cell: this interpreter, the project's own command line."""
    return [sys.executable, "-m", "experiments", *cell.arguments(resume=resume)]


class Sweep:
    """Runs what is left of a plan, `jobs` cells at the same time, and says how it goes."""

    def __init__(
        self, plan: Plan, console: Console, *, jobs: int = 1, command: Command = cell_command
    ) -> None:
        self._plan, self._console = plan, console
        self._jobs, self._command = jobs, command
        self._active: list[Active] = []
        self._failed: list[Cell] = []

    def run(self) -> int:
        """Run all cells that have not completed.

        Returns 0 when all have completed, 1 when one failed, 130 when the sweep was interrupted.
        """
        name = self._plan.description or self._plan.file.stem
        self._say(f"{name}: {len(self._plan.cells)} cells in {self._plan.folder}", "bold")
        try:
            with terminate_as_interrupt(), own(self._plan.folder):
                self._loop()
        except KeyboardInterrupt:
            self._say("interrupted; the same command goes on where it was", "bold red")
            return INTERRUPTED
        for cell in self._failed:
            self._say(f"failed  {cell.folder}", "bold red")
        if self._failed:
            self._say("what they said is in console.log and run.log; the same command tries again")
        self._say(f"\nnext: mh-pfedhn report {self._plan.folder}")
        return FAILED if self._failed else 0

    def _loop(self) -> None:
        cells = self._plan.cells
        queue = [cell for cell in cells if state_of(Run.read(cell.folder)) != "completed"]
        if skipped := len(cells) - len(queue):
            self._say(f"{skipped} of {len(cells)} cells are completed and skipped")
        try:
            while queue or self._active:
                busy = {cell.folder for cell in [*queue, *(item.cell for item in self._active)]}
                ready = [cell for cell in queue if cell.after not in busy]
                for cell in ready[: self._jobs - len(self._active)]:
                    queue.remove(cell)
                    self._begin(cell)
                for item in [item for item in self._active if item.ended]:
                    self._active.remove(item)
                    self._close(item)
                self._say_progress()
                sleep(POLL_S)
        finally:
            self._stop()

    def _begin(self, cell: Cell) -> None:
        """Start a cell, go on with it, or follow the process that runs it already."""
        child = None
        process = process_of(Run.read(cell.folder).note)
        if process:
            self._say(f"found running, followed  {cell.name}")
        else:
            try:
                resume = make_ready(cell, self._plan)
                command, log = self._command(cell, resume), cell.folder / CONSOLE
                child = start(command, env=environment(), log=log, cwd=Path.cwd())
            except RunError as error:
                return self._fail(cell, str(error))
            process = psutil.Process(child.pid)
            write_note(cell, process=process_mark(process))
            self._say(f"{'resumed' if resume else 'started':<9} {cell.name}")
        self._active.append(Active(cell, process, child, monotonic()))

    def _close(self, item: Active) -> None:
        cell, found = item.cell, Run.read(item.cell.folder)
        if found.status == "completed":
            tidy(cell, keep=self._plan.keep_checkpoints)
            spent = clock(found.total("seconds_round"))
            self._say(f"done      {cell.name}  accuracy {_accuracy(found)}  {spent}", "green")
        elif found.status == "failed":
            self._fail(cell, reason_of(found))
        else:
            code = item.child.returncode if item.child else None
            words = " ".join(error_lines(cell.folder / CONSOLE, limit=3)) or "no output"
            self._fail(cell, f"ended with exit status {code}: {words}")

    def _fail(self, cell: Cell, reason: str) -> None:
        write_note(cell, failed=reason)
        self._failed.append(cell)
        self._say(f"failed    {cell.name}  {reason}", "bold red")

    def _say_progress(self) -> None:
        """Say once in a while how far each running cell is, and how long all will take."""
        for item in self._active:
            if monotonic() - item.said < LINE_EVERY_S:
                continue
            item.said = monotonic()
            found = Run.read(item.cell.folder)
            left = time_left(self._plan.cells, jobs=self._jobs)
            said = f"round {found.rounds_done}/{item.cell.rounds}  accuracy {_accuracy(found)}"
            said += f"  all cells: left {clock(left)}" if left is not None else ""
            self._say(f"          {item.cell.name}  {said}")

    def _stop(self) -> None:
        """End what still runs, gently first, so that every run says that it was interrupted."""
        for item in self._active:
            with contextlib.suppress(psutil.Error):
                item.process.terminate()
        psutil.wait_procs([item.process for item in self._active], timeout=STOP_PATIENCE_S)
        for item in self._active:
            if not item.ended:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(item.process.pid, signal.SIGKILL)
            if item.child:
                item.child.wait()

    def _say(self, text: str, style: str = "") -> None:
        say(self._console, text, style=style)


def time_left(cells: Sequence[Cell], *, jobs: int = 1) -> float | None:
    """Estimate the seconds that cells still take, from what rounds have cost; None without any.

    A variant's own rounds count where there are some, else those of all.
    """
    found = [(cell, Run.read(cell.folder)) for cell in cells]

    def pace(runs: list[Run]) -> float | None:
        rounds = sum(run.rounds_done for run in runs)
        return sum(run.total("seconds_round") for run in runs) / rounds if rounds else None

    if (mean := pace([run for _, run in found])) is None:
        return None
    own = {v: pace([run for cell, run in found if cell.variant == v])
           for v in {cell.variant for cell in cells}}  # fmt: skip
    left = (max(0, c.rounds - run.rounds_done) * (own[c.variant] or mean) for c, run in found)
    return sum(left) / jobs


def show_status(plan: Plan, console: Console) -> int:
    """Print a line for each cell; exit status 1 when a cell failed."""
    table = table_of("cell", "state", "round", "accuracy", "time", numbers=(2, 3, 4))
    counts: Counter[str] = Counter()
    for cell in plan.cells:
        found = Run.read(cell.folder)
        state = state_of(found)
        counts[state] += 1
        table.add_row(
            cell.name, f"[{COLOURS.get(state, 'dim')}]{state}[/]",
            f"{found.rounds_done}/{cell.rounds}", _accuracy(found),
            clock(found.total("seconds_round")) if found.rows else "-",
        )  # fmt: skip
        if state == "failed":
            table.add_row(f"  [red]{escape(reason_of(found))}[/]")
    console.print(table)
    parts = [f"{number} {state}" for state, number in counts.items()]
    say(console, f"\n{len(plan.cells)} cells: {', '.join(parts)}")
    pid, left = holder(plan.folder), counts["running"]
    how = f"running as process {pid}" if pid else "not running"
    if not pid and left:
        runs, them = ("cells run", "them") if left > 1 else ("cell runs", "it")
        how += f", but {left} {runs} on: the next sweep follows {them}"
    say(console, f"{how}; folder {plan.folder}")
    return FAILED if counts["failed"] else 0


def detach(plan: Plan, arguments: Sequence[str]) -> tuple[int, Path]:
    """Start the sweep again as a process that outlives this terminal; return its id and its log."""
    with own(plan.folder):  # refuse now, not in a log that nobody reads
        pass
    command = [sys.executable, "-m", "experiments", "sweep", *arguments]
    log = plan.folder / LOG
    return start(command, env=environment(), log=log, cwd=Path.cwd()).pid, log


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Own a sweep's folder; raise RunError where another sweep is at work in it."""
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
        replace_file(folder / HOLDER, json.dumps({"process": process_mark(psutil.Process())}))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> int | None:
    """Return the process id of the sweep that is at work in a folder, or None."""
    process = process_of(read_json(folder / HOLDER))
    return process.pid if process else None


def environment() -> dict[str, str]:
    """Return the surroundings of a cell: this copy of the project must be the one that runs."""
    root = str(Path(__file__).parents[2])
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def _accuracy(found: Run) -> str:
    scored = [row["accuracy_micro"] for row in found.rows if "accuracy_micro" in row]
    return percent(scored[-1] if scored else None)
