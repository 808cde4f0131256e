"""Timings that survive a shared machine: variants take turns, the minimum and median are kept."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Wall seconds over the repeats, and the least CPU seconds of this process."""

    best: float
    median: float
    cpu: float


def take_turns(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each variant `repeats` times, in turns, after one untimed call of each."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(repeats):
        for name, call in variants.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            call()
            synchronize()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    return {n: Timing(min(wall[n]), statistics.median(wall[n]), min(cpu[n])) for n in variants}


def peak_bytes() -> int:
    """Return the largest resident memory that this process ever had.

    From /proc where there is one: `ru_maxrss` starts with the memory of the process that started
    this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def synchronize() -> None:
    """Wait for what a GPU has yet to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
