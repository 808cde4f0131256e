"""Machines with a home each, on which the documented commands are typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from experiments.run.engines.processes import free_port
from tests.support.deployment import BIN, REPOSITORY, wait_until

PATIENCE_S = 600.0


class Machine:
    """A home, and what runs there; what is typed has it as its home."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.home.mkdir(parents=True)
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
        self.environment = kept | {
            "HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def run(self, command: str, status: int = 0) -> str:
        """Run a line as somebody would type it; return what it prints."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.home, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{command}\n{done.stdout}"
        return done.stdout

    def start(self, name: str, command: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.started[name] = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.home, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, words: str, times: int = 1) -> None:
        def said() -> bool:
            return self.log(name).count(words) >= times

        wait_until(said, PATIENCE_S, f"{name} says {words!r}:\n{self.log(name)[-3000:]}")

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL, and wait until what it had started is gone too."""
        process = self.started.pop(name)
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(below, timeout=60)[1]

    def stop(self) -> None:
        for process in reversed(self.started.values()):
            process.send_signal(signal.SIGINT)
        for process in self.started.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


class Operator(Machine):
    """Makes a federation by docs/deploy.md, "Machines"."""

    def make(self, contract: dict[str, object], sites: list[str]) -> None:
        self.port = free_port()
        self.run("mh-pfedhn contract new federation.toml")
        text = (self.home / "federation.toml").read_text()
        for key, value in (contract | {"server": f"127.0.0.1:{self.port}"}).items():
            line = f"{key} = {json.dumps(value)}"
            text, edited = re.subn(f"^{key} = .*$", line, text, flags=re.MULTILINE)
            assert edited == 1
        (self.home / "federation.toml").write_text(text)
        names = " ".join(f"--site {site}" for site in sites)
        self.run(f"mh-pfedhn certs certs --host 127.0.0.1 {names} --contract federation.toml")
        self.run("mkdir -p ~/.flwr && cp certs/server/flwr.toml ~/.flwr/config.toml")
        self.run(f"sed -i s/:8000/:{self.port}/ ~/.flwr/config.toml")
        self.start(
            "superlink",
            f"mh-pfedhn superlink --host 127.0.0.1 --port {self.port} --isolation process "
            "--enable-supernode-auth --database state.db --ssl-ca-certfile certs/server/ca.crt "
            "--ssl-certfile certs/server/server.crt --ssl-keyfile certs/server/server.key "
            "--superexec-auth-secret-file certs/server/superexec.secret",
        )
        self.start(
            "server",
            f"mh-pfedhn serve --superlink 127.0.0.1:{self.port} "
            "--certificate certs/server/ca.crt --secret certs/server/superexec.secret",
        )
        for site in sites:
            register = f"flwr supernode register certs/server/supernodes/{site}.pub --name {site}"
            wait_until(lambda line=register: self._done(line), PATIENCE_S, register)

    def _done(self, command: str) -> bool:
        """Whether a command works by now: the SuperLink may not listen yet."""
        words = {"cwd": self.home, "env": self.environment, "capture_output": True}
        return subprocess.run(["bash", "-c", command], check=False, **words).returncode == 0  # type: ignore[call-overload, no-any-return]

    def begin(self, **settings: object) -> None:
        more = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in settings.items())
        agreed = "$(mh-pfedhn contract run federation.toml)"
        config = f"{agreed} min-clients=2 output-dir='{self.home}/run' {more}"
        self.run(f'flwr run {REPOSITORY} federation --run-config "{config}"')

    def rows(self) -> list[dict[str, float]]:
        path = self.home / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Site(Machine):
    """A participant: a file of five lines, and two commands."""

    def declare(self, name: str, bundle: Path, **lines: str) -> None:
        self.name = name
        self.run(f"cp -r {bundle} bundle")
        facts = {"client-id": name, "bundle": "bundle", "state-dir": "state"}
        facts |= {key.replace("_", "-"): value for key, value in lines.items()}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in facts.items())
        (self.home / "my_site.toml").write_text(text)
        self.run("mh-pfedhn join my_site.toml --check")

    def join(self) -> None:
        self.start("join", "mh-pfedhn join my_site.toml")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(f"mh-pfedhn status state/{self.name} --json"))
        return found


@contextmanager
def minutes(what: str) -> Iterator[None]:
    """Say how many minutes something took (`pytest -s` shows it)."""
    started = time.monotonic()
    yield
    print(f"{(time.monotonic() - started) / 60:5.1f} min  {what}", file=sys.stderr, flush=True)


@contextmanager
def stopping(*machines: Machine) -> Iterator[None]:
    """Stop all that runs on these machines in the end."""
    try:
        yield
    finally:
        for machine in reversed(machines):
            machine.stop()
