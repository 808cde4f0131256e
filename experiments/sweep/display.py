"""Progress of a sweep: bars in a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from experiments.report.terminal import percent
from experiments.run.progress import clock
from experiments.sweep.cells import Standing, standing
from experiments.sweep.plan import Cell

LINE_EVERY_S = 60.0


class Forecast:
    """Estimates the time that is left from what rounds have cost so far.

    A variant's own rounds count where there are any; else those of all.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._left = {cell.name: (cell.variant, cell.rounds) for cell in cells}
        self._rounds: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def at(self, cell: Cell, server_round: int) -> None:
        """Note how far a cell is."""
        self._left[cell.name] = (cell.variant, max(0, cell.rounds - server_round))

    def cost(self, cell: Cell, rounds: int, seconds: float) -> None:
        """Note what some rounds of a cell took."""
        self._rounds[cell.variant] = self._rounds.get(cell.variant, 0) + rounds
        self._seconds[cell.variant] = self._seconds.get(cell.variant, 0.0) + seconds

    def gone(self, cell: Cell) -> None:
        """Note that nothing more will come of a cell."""
        self._left.pop(cell.name, None)

    def seconds_of(self, cell: Cell) -> float | None:
        """Return how long one cell still takes, None while nobody can know."""
        variant, rounds = self._left.get(cell.name, (cell.variant, 0))
        pace = self._pace(variant)
        return None if pace is None else rounds * pace

    def seconds(self, jobs: int = 1) -> float | None:
        """Return how long all cells together still take."""
        total = 0.0
        for variant, rounds in self._left.values():
            pace = self._pace(variant)
            if pace is None:
                return None
            total += rounds * pace
        return total / jobs

    def _pace(self, variant: str) -> float | None:
        if self._rounds.get(variant):
            return self._seconds[variant] / self._rounds[variant]
        rounds = sum(self._rounds.values())
        return sum(self._seconds.values()) / rounds if rounds else None


class Display:
    """Shows a sweep while it runs."""

    def __init__(self, console: Console, *, jobs: int = 1) -> None:
        self._console = console
        self._jobs = jobs
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._spoken: dict[str, float] = {}
        self._counts = {"completed": 0, "failed": 0}
        self._total = 0

    def begin(self, cells: Sequence[Cell]) -> None:
        """Show what is there and what is to come."""
        self._forecast = Forecast(cells)
        self._total = len(cells)
        for cell in cells:
            now = standing(cell)
            self._forecast.at(cell, now.server_round)
            self._forecast.cost(cell, now.server_round, now.seconds)
            if now.state == "completed":
                self._counts["completed"] += 1
                self._forecast.gone(cell)
        self._bars.start()
        self._all = self._bars.add_task("[bold]all cells[/]", total=self._total, note="")
        if skipped := self._counts["completed"]:
            self._say(f"{skipped} of {self._total} cells are completed and skipped")
        self._refresh()

    def started(self, cell: Cell, how: str) -> None:
        """Give the cell a bar."""
        self._say(f"{how:<8}  {cell.name}")
        self._tasks[cell.name] = self._bars.add_task(_short(cell.name), total=cell.rounds, note="")
        self._spoken[cell.name] = monotonic()

    def advanced(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Take one more round of a running cell."""
        server_round, seconds = int(row["round"]), float(row.get("seconds_round", 0.0))
        self._forecast.at(cell, server_round)
        self._forecast.cost(cell, 1, seconds)
        parts = [f"round {server_round}/{cell.rounds}"]
        if "accuracy_micro" in row:
            parts.append(f"accuracy {percent(row['accuracy_micro'])}")
        if (left := self._forecast.seconds_of(cell)) is not None:
            parts.append(f"left {clock(left)}")
        note = "  ".join(parts)
        self._bars.update(self._tasks[cell.name], completed=server_round, note=note)
        self._refresh()
        if not self._console.is_terminal and self._is_time(cell):
            self._say(f"          {cell.name}  {note}")

    def finished(self, cell: Cell, now: Standing) -> None:
        """Say how a cell ended."""
        good = now.state == "completed"
        self._counts["completed" if good else "failed"] += 1
        self._forecast.gone(cell)
        if (task := self._tasks.pop(cell.name, None)) is not None:
            self._bars.remove_task(task)
        if good:
            result = f"accuracy {percent(now.accuracy)}  {clock(now.seconds)}"
            self._say(f"[green]done[/]      {cell.name}  {result}")
        else:
            self._say(f"[bold red]failed[/]    {cell.name}  {escape(now.reason)}")
        self._refresh()

    def end(self) -> None:
        """Take the bars away."""
        self._bars.stop()

    def _refresh(self) -> None:
        done, failed = self._counts["completed"], self._counts["failed"]
        parts = [f"{done}/{self._total} done"]
        if failed:
            parts.append(f"[red]{failed} failed[/]")
        if (left := self._forecast.seconds(self._jobs)) is not None:
            parts.append(f"left {clock(left)}")
        self._bars.update(self._all, completed=done + failed, note="  ".join(parts))

    def _is_time(self, cell: Cell) -> bool:
        if monotonic() - self._spoken[cell.name] < LINE_EVERY_S:
            return False
        self._spoken[cell.name] = monotonic()
        return True

    def _say(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True)


def _short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"
