"""The machine's name and its own peaks, measured: what the other figures are held against."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from experiments.benchmarks.timing import take_turns


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

    def seconds(self, *, flops: float = 0.0, traffic: float = 0.0) -> float:
        """Return the least time for so many operations and bytes, one after the other."""
        return flops / self.flops + traffic / self.bandwidth

    def bound(self, seconds: float, *, flops: float = 0.0, traffic: float = 0.0) -> dict[str, Any]:
        """Say what bounds a measured time, and how far it is from there (1 is the bound)."""
        least = self.seconds(flops=flops, traffic=traffic)
        mostly = "FLOPs" if flops / self.flops > traffic / self.bandwidth else "memory traffic"
        return {
            "bounded_by": mostly,
            "flops": flops,
            "traffic_bytes": traffic,
            "bound_seconds": least,
            "distance": seconds / least if least else 0.0,
        }

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return asdict(self)


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
        load=os.getloadavg()[0],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        flops=2 * size**3 / found["product"].best,
        bandwidth=2 * source.nbytes / found["copy"].best,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
