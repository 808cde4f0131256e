"""Being stopped: every signal that asks a run to stop arrives as KeyboardInterrupt, and arrives."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from threading import Timer
from types import FrameType
from typing import Any

# POSIX closes a terminal with SIGHUP; Windows has none.
ASKED_TO_STOP = ("SIGTERM", "SIGHUP")
AGAIN_S = 0.05


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that a stopped run cleans up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    kept: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: nobody sends signals here
        for name in ASKED_TO_STOP:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup: stay
                kept[number] = signal.signal(number, interrupt)
    try:
        with _none_lost():
            yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _none_lost() -> Iterator[None]:
    """Send an interrupt again that Python has dropped.

    A handler runs wherever the main thread happens to be. What it raises in a destructor or in the
    callback of a weak reference ends there; only `sys.unraisablehook` is told.
    """
    before, timers = sys.unraisablehook, []

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            before(dropped)
            return
        number = getattr(signal, str(dropped.exc_value), signal.SIGINT)
        timers.append(Timer(AGAIN_S, os.kill, (os.getpid(), number)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()
            timer.join()
