"""The Ray engine: Flower's simulation, on a SuperLink of our own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from common.config import RunConfig
from experiments.run.engines.superlink import SuperLink
from experiments.run.presets import EngineSection


class RayEngine(SuperLink):
    """A context in which simulated federations run; `engine` says how many clients share what."""

    def __init__(
        self, engine: EngineSection, *, log: Path, extra_env: Mapping[str, str] | None = None
    ) -> None:
        options = ("--simulation", "--isolation", "subprocess")
        super().__init__(log=log, extra_env=extra_env, options=options)
        self._engine = engine

    def run(self, config: RunConfig, *words: str) -> None:
        """Run to the end; raise RunError when the run did not complete."""
        super().run(config, "--federation-config", self.federation(), *words)

    def federation(self) -> str:
        """Return the settings of Flower's simulation: clients, their resources, Ray's CPUs."""
        engine = self._engine
        workers = engine.workers or max(1, available_cpus() // engine.client_cpus)
        workers = min(workers, engine.num_clients)  # an actor without a client only costs memory
        return (
            f"num-supernodes={engine.num_clients} "
            f"client-resources-num-cpus={engine.client_cpus} "
            f"client-resources-num-gpus={float(engine.client_gpus)} "
            f"init-args-num-cpus={workers * engine.client_cpus}"
        )


def available_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cpus, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cpus
