"""A SuperLink of our own: a free port, a temporary FLWR_HOME, an end, and nothing left behind.

Flower would start a shared SuperLink that stays alive, is found by its port alone, and freezes the
environment of whoever came first. The Ray engine is Flower's simulation on one of our own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from common.config import RunConfig
from common.config.keys import to_toml
from common.errors import RunError
from experiments.run.engines import processes
from experiments.run.engines.home import (
    CLUSTER,
    child_environment,
    new_home,
    remove_abandoned_homes,
    stage_app,
)
from experiments.run.presets import EngineSection

CONNECTION = "mh-pfedhn"
START_TIMEOUT_S = 120.0
COMPLETED = "finished:completed"


class SuperLink:
    """A context in which runs can be started; leaving it stops every process and removes the rest.

    Entering returns at once: the SuperLink starts while the caller does something else. `log`
    receives what ServerApp and simulated clients print, all processes get `extra_env` beside what
    isolates them, and `options` are more words of the command line of `flower-superlink`.
    """

    def __init__(
        self,
        *,
        log: Path,
        extra_env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._log = log
        self._extra_env = dict(extra_env or {})
        self._options = options
        self._started: list[processes.Process] = []
        self.port = processes.free_port()
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        remove_abandoned_homes()
        self.home = new_home()
        self._guard = contextlib.ExitStack()
        try:
            self._guard.enter_context(processes.guarded(str(self.home)))
            self.environment = child_environment(os.environ, home=self.home) | self._extra_env
            # An address, not ":local:": if it dies, flwr says so and starts no shared one.
            (self.home / "config.toml").write_text(
                f'[superlink]\ndefault = "{CONNECTION}"\n\n'
                f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
            )
            stage_app(self.home / "app")
            self._superlink_log = self.home / "superlink.log"
            words = ["--insecure", "--host", "127.0.0.1", "--port", str(self.port), *self._options]
            self._superlink = self.start("flower-superlink", *words, log=self._superlink_log)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def start(
        self, program: str, *words: str, log: Path, env: Mapping[str, str] | None = None
    ) -> processes.Process:
        """Start one of Flower's programs; `env` adds to the environment of all."""
        command = [processes.find_program(program), *words]
        full = {**self.environment, **(env or {})}
        process = processes.start(command, env=full, log=log, cwd=self.home)
        self._started.append(process)
        return process

    def run(self, config: RunConfig, *words: str) -> None:
        """Run to the end; `words` are more arguments of `flwr run`.

        Raises RunError with Flower's final status where the run did not complete.
        """
        processes.wait_until_healthy(
            self._superlink, port=self.port, timeout_s=START_TIMEOUT_S, log=self._superlink_log
        )
        overrides = self.home / "run-config.toml"
        overrides.write_text(to_toml(config.flat()), encoding="utf-8")
        arguments = [str(self.home / "app"), CONNECTION, "--stream", "--run-config", str(overrides)]
        code = self.start("flwr", "run", *arguments, *words, log=self._log).wait()
        status = self._final_status()  # `flwr run` exits with 0 even when the run failed
        if code != 0 or status != COMPLETED:
            with contextlib.suppress(OSError):
                shutil.copy(self._superlink_log, self._log.with_name("superlink.log"))
            raise RunError(
                f"the run did not complete: Flower's final status is {status!r} "
                f"(flwr run exited with {code})."
            )

    def _final_status(self) -> str:
        listed = subprocess.run(
            [processes.find_program("flwr"), "ls", CONNECTION, "--format", "json"],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        return parse_status(listed.stdout)

    def _clean_up(self) -> None:
        with _uninterrupted():
            processes.stop_marked(str(self.home))
            self._guard.close()
            for process in self._started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5.0)
            shutil.rmtree(self.home, ignore_errors=True)
            if prefix := self.environment.get("PYTHONPYCACHEPREFIX"):  # bytecode of the staged app
                shutil.rmtree(Path(prefix + str(self.home)), ignore_errors=True)


class RayEngine(SuperLink):
    """A context in which simulated federations run; `engine` says how many clients share what.

    They run on the Ray cluster that the environment names (RAY_ADDRESS), or on a Ray of their own.
    """

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
        """Return the settings of Flower's simulation: clients, their resources, Ray's CPUs.

        A cluster that is there has its CPUs: as many clients run at once as it has room for.
        """
        engine = self._engine
        settings = (
            f"num-supernodes={engine.num_clients} "
            f"client-resources-num-cpus={engine.client_cpus} "
            f"client-resources-num-gpus={float(engine.client_gpus)}"
        )
        if os.environ.get(CLUSTER):
            return settings
        workers = engine.workers or max(1, available_cpus() // engine.client_cpus)
        workers = min(workers, engine.num_clients)  # an actor without a client only costs memory
        return f"{settings} init-args-num-cpus={workers * engine.client_cpus}"


def available_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cpus, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cpus


def parse_status(stdout: str) -> str:
    """Return the status of the newest run from `flwr ls --format json`, e.g. "finished:completed".

    "unknown" when there is none, or the output is not what Flower prints.
    """
    try:
        runs: list[dict[str, Any]] = json.loads(stdout[stdout.index("{") :])["runs"]
        return str(runs[0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown"


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
