"""A deployment on one machine: a real SuperLink, real SuperNodes, `flwr run`, as processes.

For tests and measurements of what separate machines would run. Loopback and without TLS: never a
template for a real federation.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.config import RunConfig
from common.errors import RunError
from experiments.deploy.join import find_program
from experiments.run.engines import processes
from experiments.run.engines.home import child_environment, stage_app
from experiments.run.engines.ray import parse_status
from experiments.run.presets import to_toml

CONNECTION = "loopback"
START_TIMEOUT_S = 120.0


class Loopback:
    """A SuperLink and the nodes that were started; leaving the context stops every process.

    Parameters
    ----------
    folder
        Holds everything: Flower's homes, logs, the staged app. Its path marks the processes.
    extra_env
        Environment variables of all processes, for instance PYTHONPATH for users' own models.
    """

    def __init__(self, folder: Path, *, extra_env: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self.port = processes.free_port()
        self._extra_env = dict(extra_env or {})
        self._started: list[processes.Process] = []

    def __enter__(self) -> Self:
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        if not (self.folder / "app").exists():
            stage_app(self.folder / "app")
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port"]
        try:
            superlink = self.start("superlink", [*command, str(self.port)])
            processes.wait_until_healthy(
                superlink, port=self.port, timeout_s=START_TIMEOUT_S, log=self.log("superlink")
            )
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

    def start_node(self, name: str, node_config: Mapping[str, Any]) -> processes.Process:
        """Start a SuperNode with its own FLWR_HOME."""
        settings = self.folder / f"{name}.toml"
        settings.write_text(to_toml(node_config))
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(processes.free_port())]
        return self.start(name, [*command, "--node-config", str(settings)])

    def run(self, config: RunConfig, *, timeout_s: float = 600.0) -> None:
        """Run a federation to its end.

        Raises
        ------
        RunError
            It did not complete within `timeout_s`; the end of its log is quoted.
        """
        process = self.begin(config)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
        status = self.status()
        if status != "finished:completed":
            end = processes.quote_end(self.log("run"))
            raise RunError(f"the run is {status!r}, not completed. {end}")

    def begin(self, config: RunConfig) -> processes.Process:
        """Start `flwr run`; it ends with the run."""
        overrides = self.folder / "run-config.toml"
        overrides.write_text(to_toml(config.flat()))
        command = ["flwr", "run", str(self.folder / "app"), CONNECTION, "--stream"]
        return self.start("run", [*command, "--run-config", str(overrides)], home="home")

    def start(self, name: str, command: list[str], *, home: str = "") -> processes.Process:
        """Start one of Flower's programs with FLWR_HOME = folder/name, output in name.log."""
        process = processes.start(
            [find_program(command[0]), *command[1:]],
            env=self.environment(home or name),
            log=self.log(name),
            cwd=self.folder,
        )
        self._started.append(process)
        return process

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of one process: isolated, quiet, marked as this deployment's."""
        env = child_environment(os.environ, home=self.folder / name)
        return env | {processes.MARK: str(self.folder)} | self._extra_env

    def log(self, name: str) -> Path:
        """Return the file with what a process printed."""
        return self.folder / f"{name}.log"

    def status(self) -> str:
        """Return Flower's status of the last run."""
        answer = subprocess.run(
            [find_program("flwr"), "ls", CONNECTION, "--format", "json"],
            env=self.environment("home"),
            capture_output=True,
            text=True,
            check=False,
        )
        return parse_status(answer.stdout)

    def _clean_up(self) -> None:
        processes.stop_marked(str(self.folder))
        for process in self._started:
            process.wait(timeout=10.0)
