"""What is needed of a clock, so that tests can have one of their own."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """What the transport needs of `time`; seconds."""

    def monotonic(self) -> float:
        """Return the time."""

    def sleep(self, seconds: float, /) -> None:
        """Let time pass."""
