"""A run that is asked to stop stops, wherever Python happens to be when the signal comes."""

from __future__ import annotations

import signal
import sys
from time import sleep

import pytest

from experiments.run.interrupts import terminate_as_interrupt


class SignalledWhenFreed:
    """Where Python drops what a handler raises."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


def work_on(number: signal.Signals) -> None:
    """Free what sends the signal, then work for ten seconds, as nothing may that was stopped."""
    held = [SignalledWhenFreed(number)]
    held.clear()
    sleep(10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dropped_interrupt_comes_again(number: signal.Signals) -> None:
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
            work_on(number)
    finally:
        signal.signal(signal.SIGINT, kept)
    assert (sys.unraisablehook, signal.getsignal(signal.SIGTERM)) == (hook, handler)


def test_other_dropped_errors_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_value))

    class Broken:
        def __del__(self) -> None:
            raise ValueError("in a destructor")

    with terminate_as_interrupt():
        held = [Broken()]
        held.clear()
    assert [str(error) for error in told] == ["in a destructor"]
