"""A deployment on one machine: a real SuperLink, real SuperNodes, `flwr run`, as processes.

For tests and measurements of what separate machines would run. Loopback and without TLS: never a
template for a real federation.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from common.config import RunConfig
from common.errors import RunError
from experiments.lean_clientapp import install_lean_clientapp
from experiments.toml_text import to_toml

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("server_app", "client_app", "common", "pyproject.toml", "README.md")
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
        self.port = free_port()
        self._extra_env = dict(extra_env or {})

    def __enter__(self) -> Self:
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self._stage()
        self.superlink = self.start(
            "superlink",
            ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)],
        )
        self._wait_for_port()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stop_processes_of(self.folder)

    def start_node(
        self, name: str, node_config: Mapping[str, Any], *, lean: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode with its own FLWR_HOME; `lean` starts messages as `join` does."""
        settings = self.folder / f"{name}.toml"
        settings.write_text(to_toml(node_config))
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
        programs = install_lean_clientapp(self.folder / name) if lean else None
        return self.start(name, [*command, "--node-config", str(settings)], programs=programs)

    def run(self, config: RunConfig, *, timeout_s: float = 600.0) -> None:
        """Run a federation to its end.

        Raises
        ------
        RunError
            It did not complete within `timeout_s`; the end of its log is quoted.
        """
        overrides = self.folder / "run-config.toml"
        overrides.write_text(to_toml(config.flat()))
        command = ["flwr", "run", str(self.folder / "app"), CONNECTION, "--stream"]
        process = self.start("home", [*command, "--run-config", str(overrides)], log="run.log")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        status = self._status()
        if status != "finished:completed":
            raise RunError(f"the run is {status!r}, not completed.\n{self.tail('run.log')}")

    def start(
        self, name: str, command: list[str], *, log: str = "", programs: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start one of Flower's programs with FLWR_HOME = folder/name, output in name.log."""
        env = self.environment(name)
        if programs is not None:
            env["PATH"] = os.pathsep.join([str(programs), env["PATH"]])
        with (self.folder / (log or f"{name}.log")).open("ab") as output:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of one process: isolated, quiet, its imports compiled once."""
        env = dict(os.environ) | {
            "FLWR_HOME": str(self.folder / name),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if env.get("PYTHONDONTWRITEBYTECODE") and not env.get("PYTHONPYCACHEPREFIX"):
            # without it every process compiles torch and flwr again, which no deployment does
            cache = Path.home() / ".cache" / "mh-pfedhn" / "bytecode"
            env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}
        return env | self._extra_env

    def tail(self, log: str, lines: int = 25) -> str:
        """Return the last lines of a log."""
        text = (self.folder / log).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _status(self) -> str:
        answer = subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), "ls", CONNECTION, "--format", "json"],
            env=self.environment("home"),
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            return str(json.loads(answer.stdout)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            return f"unknown ({answer.stdout}{answer.stderr})"

    def _stage(self) -> None:
        app = self.folder / "app"
        shutil.rmtree(app, ignore_errors=True)
        app.mkdir()
        for name in SHIPPED:
            source = PROJECT_ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, app / name, ignore=shutil.ignore_patterns("__pycache__", "test*")
                )
            else:
                shutil.copy(source, app)

    def _wait_for_port(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.superlink.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            time.sleep(0.1)
        raise RunError(f"the SuperLink did not start.\n{self.tail('superlink.log')}")


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose FLWR_HOME is below a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            home = process.environ().get("FLWR_HOME", "")
            if home.startswith(f"{folder.resolve()}{os.sep}") and process.status() != "zombie":
                found.append(process)
    return found


def stop_processes_of(folder: Path) -> None:
    """End the processes whose FLWR_HOME is below a folder: asked first, then killed."""
    for _ in range(3):  # again, for what was being started meanwhile
        found = processes_of(folder)
        for process in found:
            with suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(found, timeout=4.0)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        if not found:
            return
