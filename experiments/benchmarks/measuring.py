"""How every part measures: in turns, against the machine's own peaks, in a process of its own."""

from __future__ import annotations

import logging
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

Row = dict[str, Any]
"""Figures of one measurement by name, or `skipped` with the reason (`failed`: an error)."""


@dataclass(frozen=True)
class Timing:
    """The least wall seconds of the repeats, and the least CPU seconds of this process."""

    best: float
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
    return {name: Timing(min(wall[name]), min(cpu[name])) for name in variants}


def synchronize() -> None:
    """Wait for what a GPU has yet to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def devices() -> list[str]:
    """Return where clients can be measured here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Machine:
    """Name, size and measured peaks of where this ran.

    `cuda` is the version that torch was built for: with a GPU in the machine and "none" as `gpu`,
    the driver is too old for it. `flops` is the rate of a large float32 matrix product in FLOP/s,
    `bandwidth` that of a large copy in bytes/s (read and written), both with `threads` torch
    threads on the CPU.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    load: float
    gpu: str
    cuda: str
    torch: str
    flops: float
    bandwidth: float

    def bound(self, seconds: float, *, flops: float = 0.0, traffic: float = 0.0) -> Row:
        """Say what bounds a measured time, and how far it is from there (1 is the bound)."""
        least = flops / self.flops + traffic / self.bandwidth
        mostly = "FLOPs" if flops / self.flops > traffic / self.bandwidth else "memory traffic"
        return {"bounded_by": mostly, "bound_seconds": least, "distance": seconds / least}


def inspect_machine(repeats: int, *, size: int = 2048) -> Machine:
    """Name the machine and measure its peaks with a (size, size) product and copy."""
    a, b, out = (torch.ones(size, size) for _ in range(3))
    source, target = torch.ones(16 * size * size), torch.empty(16 * size * size)
    found = take_turns(
        {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)},
        repeats,
    )
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        load=psutil.getloadavg()[0],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        flops=2 * size**3 / found["product"].best,
        bandwidth=2 * source.nbytes / found["copy"].best,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def attempt(measure: Callable[..., Row], *arguments: Any) -> Row:
    """Measure; a failure becomes a row that says so, and the other measurements go on."""
    started = time.monotonic()
    try:
        row = dict(measure(*arguments))
    except Exception as error:  # the benchmark's edge: an engine may be absent or not start here
        row = {
            "skipped": f"{type(error).__name__}: {str(error)[:300]}",
            "failed": True,
            "traceback": traceback.format_exc()[-4000:],
        }
    return row | {"seconds_measuring": time.monotonic() - started}


def in_own_process(measure: Callable[..., Row], *arguments: Any, threads: int = 1) -> Row:
    """Measure in a fresh process with so many torch threads, for its peak memory and clean start.

    Function and arguments are pickled; a failure becomes a row, as in `attempt`.
    """
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(threads,)) as pool:
        return attempt(lambda: pool.submit(measure, *arguments).result())


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    quiet()


def quiet() -> None:
    """Keep the log lines of runs out of the table, for the rest of this process."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


def peak_bytes() -> int:
    """Return the most memory that this process ever had resident; without /proc, has now."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return int(psutil.Process().memory_info().rss)
