"""The Ray engine: `flwr run` on a SuperLink of our own, its real final status, nothing left behind.

Flower would start a shared SuperLink that stays alive, is found by its port alone, and freezes the
environment of whoever came first (flower-notes.md, section 4). Each run here has its own: a free
port, a temporary FLWR_HOME, and an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.config import RunConfig
from common.errors import RunError
from experiments.run.engines import processes
from experiments.run.engines.home import (
    child_environment,
    new_home,
    remove_abandoned_homes,
    stage_app,
)
from experiments.run.presets import EngineSection, to_toml

CONNECTION = "mh-pfedhn"
START_TIMEOUT_S = 120.0


class RayEngine:
    """A context in which runs can be started; leaving it stops every process and removes the rest.

    Entering returns at once: the SuperLink starts while the caller prepares data.

    Parameters
    ----------
    engine
        Number of clients and what each may use.
    log
        File that receives what ServerApp and clients print.
    extra_env
        Environment variables of the run's processes, beside those that isolate them.
    """

    def __init__(
        self,
        engine: EngineSection,
        *,
        log: Path,
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._log = log
        self._extra_env = dict(extra_env or {})
        self._port = processes.free_port()
        self._started: list[processes.Process] = []
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        remove_abandoned_homes()
        self.home = new_home()
        try:
            self.environment = child_environment(os.environ, home=self.home) | self._extra_env
            (self.home / "config.toml").write_text(_connection(self._port), encoding="utf-8")
            stage_app(self.home / "app")
            self._superlink_log = self.home / "superlink.log"
            self._superlink = self._start(_superlink_command(self._port), self._superlink_log)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean_up()

    def run(self, config: RunConfig) -> None:
        """Run to the end.

        Raises
        ------
        RunError
            The run did not complete: Flower's final status, and where its log is.
        """
        processes.wait_until_healthy(
            self._superlink,
            port=self._port,
            timeout_s=START_TIMEOUT_S,
            log=self._superlink_log,
        )
        overrides = self.home / "run-config.toml"
        overrides.write_text(to_toml(config.flat()), encoding="utf-8")
        command = [
            *(_program("flwr"), "run", str(self.home / "app"), CONNECTION, "--stream"),
            *("--run-config", str(overrides), "--federation-config", self.federation()),
        ]
        code = self._start(command, self._log).wait()
        status = self._final_status()
        if code != 0 or status != "finished:completed":
            self._keep_superlink_log()
            raise RunError(
                f"the run did not complete: Flower's final status is {status!r} "
                f"(flwr run exited with {code})."
            )

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

    def _final_status(self) -> str:
        command = [_program("flwr"), "ls", CONNECTION, "--format", "json"]
        answer = subprocess.run(
            command,
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        return parse_status(answer.stdout)

    def _start(self, command: list[str], log: Path) -> processes.Process:
        process = processes.start(command, env=self.environment, log=log, cwd=self.home)
        self._started.append(process)
        return process

    def _keep_superlink_log(self) -> None:
        with contextlib.suppress(OSError):
            shutil.copy(self._superlink_log, self._log.with_name("superlink.log"))

    def _clean_up(self) -> None:
        with _uninterrupted():
            processes.stop_marked(str(self.home))
            for process in self._started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5.0)
            shutil.rmtree(self.home, ignore_errors=True)
            if prefix := self.environment.get("PYTHONPYCACHEPREFIX"):  # bytecode of the staged app
                shutil.rmtree(Path(prefix + str(self.home)), ignore_errors=True)


def parse_status(stdout: str) -> str:
    """Return the status of the newest run from `flwr ls --format json`, e.g. "finished:completed".

    "unknown" when there is none, or the answer is not what Flower prints.
    """
    try:
        runs: list[dict[str, Any]] = json.loads(stdout[stdout.index("{") :])["runs"]
        return str(runs[0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown"


def available_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cpus, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cpus


def _superlink_command(port: int) -> list[str]:
    return [
        *(_program("flower-superlink"), "--insecure", "--simulation"),
        *("--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)),
    ]


def _connection(port: int) -> str:
    # An address, not ":local:": if our SuperLink dies, flwr says so and starts no shared one.
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else name


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: an impatient second one must not leave processes behind."""
    kept = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals do not come here
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
