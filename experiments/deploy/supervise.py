"""Keep a participant's SuperNode running until it is told to stop.

A SuperNode ends when its server refuses it, and for up to 60 s after a crash its server still
believes in the old connection and refuses the new one (exit code 305). It is started again, with
growing pauses, until Ctrl-C. What no waiting heals (a bad key, another Flower version) ends it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rich.console import Console

from common.files import PRIVATE, printable, replace_file
from experiments.console import say
from experiments.deploy.settings import JoinSettings
from experiments.run.engines.processes import free_port, guarded, kill_session
from experiments.run.progress import polled

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0
STEADY_S = 120.0
STOP_PATIENCE_S = 15.0
REFUSAL = "refusal.json"
MAX_LOG_BYTES = 10 << 20
LONGEST_LINE = 4000
TROUBLE = "trouble.json"
REASONS = {
    302: "the key cannot be used",
    303: "a key needs TLS: remove --insecure and give --certificate",
    304: "the file of trusted entities cannot be used",
    305: "the server refused the connection; after a crash that lasts up to 60 s. If it goes on, "
    "the server does not know your key (send its .pub to the operator) or another node uses it",
    600: "the server address cannot be used",
    603: "the certificate cannot be used",
    606: "the server runs another version of Flower: install the same on both sides",
}
FATAL = REASONS.keys() - {305}
_ROUND = re.compile(r"\[RUN \d+, ROUND (\d{1,9})\D")
NOT_RUNNING = "is not in `RUNNING` status. Ignoring reply message"
"""What a SuperNode says of a reply that comes after the run has stopped or ended."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXIT = re.compile(r"(?:ERROR ?: ?)?Exit Code: (\d+)")
"""As Flower's own line begins; a text of the server's stands behind other words."""


class Supervisor:
    """Runs one SuperNode, again and again."""

    def __init__(self, settings: JoinSettings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=60)
        self._model = settings.folder / "personal_model.json"
        self._seen = _changed(self._model)
        self._refusal = settings.folder / REFUSAL
        self._refused, self._round = "", 0
        self._refusal.unlink(missing_ok=True)  # of an earlier time

    def run(self) -> int:
        """Run until Ctrl-C or SIGTERM (0), or until it cannot work or is refused for good (1)."""
        kept = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with guarded(self._settings.mark), polled(self._look_around, 1.0):
                return self._keep_running()
        finally:
            self._end_process()
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _keep_running(self) -> int:
        pause = FIRST_PAUSE_S
        while not self._stop.is_set():
            started = time.monotonic()
            self._run_once()
            if self._stop.is_set():
                break
            code, why = explain(list(self._lines))
            if code in FATAL:
                self._say(f"stopped: {why}", "bold red")
                return 1
            if time.monotonic() - started > STEADY_S:
                pause = FIRST_PAUSE_S
            self._note_trouble(f"the SuperNode ended: {why}")
            self._say(f"the SuperNode ended: {why}; again in {pause:.0f} s", "yellow")
            self._stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        if self._refused:
            self._say(f"refused by the server: {self._refused}", "bold red")
            return 1
        self._say("left the federation; what was learned is at the server, what is yours is here:")
        self._say(str(self._settings.folder))
        return 0

    def _run_once(self) -> None:
        self._lines.clear()
        settings = self._settings
        with closing(rotating_log(settings.folder / "supernode.log")) as log:
            self._process = process = subprocess.Popen(
                settings.command(settings.port or free_port()),
                env=settings.environment(),
                cwd=settings.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes to us alone; we end it in order
            )
            if self._stop.is_set():  # the signal came while it was starting
                process.terminate()
            reader = threading.Thread(target=self._copy, args=(process.stdout, log), daemon=True)
            reader.start()
            while process.poll() is None:
                time.sleep(0.2)  # a wait() would hold back the handlers of signals
            self._end_process()  # its SuperExec may outlive it, and hold the pipe
            reader.join(timeout=5.0)

    def _copy(self, lines: TextIO, log: logging.Handler) -> None:
        with lines:
            for line in lines:
                self._lines.append(line.rstrip()[:LONGEST_LINE])
                shown = _shown(_ANSI.sub("", line.rstrip()[:LONGEST_LINE]))
                log.handle(logging.makeLogRecord({"msg": shown}))
                self._note_stop(shown)
                self._say(shown, "dim")

    def _note_stop(self, line: str) -> None:
        """Write down, for `status`, that the run stopped while this participant worked."""
        if found := _ROUND.search(line):
            self._round = int(found[1])
        elif NOT_RUNNING in line and self._round:
            from client_app.notices import note_stop

            note_stop(self._settings.folder, self._round)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        self._stop.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            threading.Timer(STOP_PATIENCE_S, self._end_process).start()

    def _end_process(self) -> None:
        """Kill what is left of the SuperNode's session."""
        if self._process is not None:
            kill_session(self._process)

    def _look_around(self) -> None:
        """Say when a run has stored this participant's model; leave where the server refuses it."""
        if self._refusal.exists():
            told = json.loads(self._refusal.read_text())
            self._refusal.unlink()
            self._note_trouble(f"refused: {printable(str(told['reason']))}")
            if told["final"]:
                self._refused = printable(str(told["reason"]))
                self._leave()
            else:
                self._say(f"not admitted yet: {printable(str(told['reason']))}", "yellow")
        changed, self._seen = _changed(self._model) != self._seen, _changed(self._model)
        if changed:
            (self._settings.folder / TROUBLE).unlink(missing_ok=True)
            facts = json.loads(self._model.read_text())
            self._say(f"your model: {self._model.with_suffix('.safetensors')}", "bold green")
            self._say(worth(facts), "bold green")

    def _note_trouble(self, reason: str) -> None:
        """Write down, for `status`, why this participant does not take part at the moment."""
        told = {"reason": reason, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        with contextlib.suppress(OSError):
            replace_file(self._settings.folder / TROUBLE, json.dumps(told), mode=PRIVATE)

    def _say(self, text: str, style: str = "") -> None:
        say(self._console, text, style=style)


def rotating_log(path: Path) -> logging.Handler:
    """Open a log of at most two files of `MAX_LOG_BYTES`: the one of now, and the one before."""
    return ClosedLog(path, maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")


class ClosedLog(RotatingFileHandler):
    """A log that only its owner reads, also after it has begun anew."""

    def _open(self) -> TextIOWrapper:
        found = super()._open()
        Path(self.baseFilename).chmod(PRIVATE)
        return found


def _shown(line: str) -> str:
    return "".join(c if c.isprintable() else " " for c in line)


def worth(facts: Mapping[str, Any]) -> str:
    """Say what joining was worth, from a personal model's description.

    >>> worth({"test_accuracy": 0.71, "num_test": 95})
    'accuracy .71 on your 95 test examples'
    >>> worth({"test_accuracy": 0.71, "num_test": 95, "accuracy_alone": 0.625, "gain": 0.085})
    'joining is worth +8.5 points: alone .62, with the federation .71 on your 95 test examples'
    """
    reached = f"{facts['test_accuracy']:.2f}".removeprefix("0")
    tested = f"{reached} on your {facts['num_test']} test examples"
    if "gain" not in facts:
        return f"accuracy {tested}"
    alone = f"{facts['accuracy_alone']:.2f}".removeprefix("0")
    points = f"{100 * facts['gain']:+.1f} points"
    return f"joining is worth {points}: alone {alone}, with the federation {tested}"


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def explain(lines: list[str]) -> tuple[int, str]:
    """Return Flower's exit code (0: none seen) and what it means here, from the last log lines."""
    plain = [printable(_ANSI.sub("", line)) for line in lines]
    codes = [found[1] for line in plain if (found := _EXIT.match(line))]
    if not codes:
        return 0, next((line for line in reversed(plain) if line), "no output")
    code = int(codes[-1])
    return code, f"{REASONS[code]} (exit code {code})" if code in REASONS else f"exit code {code}"
