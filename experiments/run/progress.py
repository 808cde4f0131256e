"""Follow a run by its folder: a bar and a line per round, whichever engine writes metrics.jsonl."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

POLL_S = 0.25


class RowTail:
    """Reads the rows that were appended to a metrics.jsonl since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Return complete new rows; a line that is still being written waits for the next call."""
        if not self._path.is_file():
            return []
        if self._path.stat().st_size < self._offset:  # the server started the file anew
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines() if line.strip()]


class Pace:
    """Estimates the time left from the last rounds, without the first: that one starts Ray."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._started = rounds, False
        self._seconds: deque[float] = deque(maxlen=5)

    def add(self, row: Mapping[str, Any]) -> float | None:
        """Take a round's row; return the seconds that are left, None while nobody can know."""
        still = self._rounds - int(row["round"])
        if self._started:
            self._seconds.append(float(row.get("seconds_round", 0.0)))
        self._started = True
        if not self._seconds:
            return None if still else 0.0
        return fmean(self._seconds) * still


def round_line(row: Mapping[str, Any], *, rounds: int, left_s: float | None) -> str:
    """Return one line about a round: accuracy, loss, traffic, seconds, time left."""
    parts = [f"round {int(row['round']):>{len(str(rounds))}}/{rounds}"]
    if (accuracy := row.get("accuracy_micro")) is not None:
        alone = row.get("accuracy_alone")
        beside = "" if alone is None else f" (alone {100 * alone:.1f} %)"
        parts.append(f"accuracy {100 * accuracy:5.1f} %{beside}")
    for key, name in (("test_loss", "test loss"), ("train_loss", "train loss")):
        if (loss := row.get(key)) is not None and loss == loss:  # private training tells none
            parts.append(f"{name} {loss:.3f}")
    traffic = float(row.get("bytes_down", 0)) + float(row.get("bytes_up", 0))
    parts += [f"{traffic / 1e6:.1f} MB", f"{float(row.get('seconds_round', 0)):.1f} s"]
    if lost := int(row.get("num_failed", 0)) + int(row.get("num_unanswered", 0)):
        parts.append(f"lost {lost} clients")
    if left_s is not None:
        parts.append(f"left {clock(left_s)}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Write seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def polled(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `look` every so many seconds in a thread while the block runs, and once after it."""
    done = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = done.wait(every_s)
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def follow(folder: Path, *, rounds: int, console: Console) -> Iterator[None]:
    """Show the progress of a run that something else runs, until the block is left.

    A terminal gets a bar as well; a file or pipe gets the lines alone.
    """
    tail, pace, started = RowTail(folder / "metrics.jsonl"), Pace(rounds), monotonic()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=rounds)

    def show() -> None:
        for row in tail.new_rows():
            if bar.tasks[0].completed == 0:
                console.print(f"[dim]first round after {clock(monotonic() - started)}[/]")
            left_s = pace.add(row)
            console.print(round_line(row, rounds=rounds, left_s=left_s), highlight=False)
            description = f"time left {clock(left_s)}" if left_s else "running"
            bar.update(task, completed=int(row["round"]), description=description)

    with bar, polled(show, POLL_S):
        yield
