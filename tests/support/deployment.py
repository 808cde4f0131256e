"""A federation of real processes on loopback: SuperLink, ServerApp, SuperNodes, TLS and keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from common.config import RunConfig
from experiments.deploy.certificates import make_certs
from experiments.run.engines.home import flower_environment
from experiments.run.engines.processes import free_port
from tests.support.tiny import trusting

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONNECTION = "loopback"


def wait_until(done: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return the first true value of `done`; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := done():
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Deployment:
    """Starts processes in sessions of their own and ends every one of them on exit."""

    def __init__(self, folder: Path, sites: list[str]) -> None:
        self.folder = folder
        self.certs = folder / "certs"
        self.port = free_port()
        self.entrance = self.port  # where everybody connects; a test may put a proxy there
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        make_certs(self.certs, hosts=["127.0.0.1", "superlink"], sites=sites)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name)

    # --- processes -------------------------------------------------------------------------------

    def start_superlink(self) -> None:
        server = self.certs / "server"
        self._start(
            "superlink",
            "mh-pfedhn superlink --host 127.0.0.1 --isolation process --enable-supernode-auth",
            f"--port {self.port} --database {self.folder / 'state.db'}",
            f"--ssl-ca-certfile {server}/ca.crt --ssl-certfile {server}/server.crt",
            f"--ssl-keyfile {server}/server.key",
            f"--superexec-auth-secret-file {server}/superexec.secret",
        )
        self.wait_for_port(self.port)

    def start_server(self) -> None:
        server = self.certs / "server"
        self._start(
            "server",
            f"mh-pfedhn serve --superlink 127.0.0.1:{self.entrance}",
            f"--certificate {server}/ca.crt --secret {server}/superexec.secret",
        )

    def register(self, site: str) -> None:
        public = self.certs / "server" / "supernodes" / f"{site}.pub"
        self.flwr("supernode", "register", str(public), CONNECTION, "--name", site)

    def start_site(self, site: str, *, key: str = "", **declared: Any) -> None:
        """Start a SuperNode; `declared` is its node config, with underscores."""
        own = self.certs / (key or site)
        config = {"client-id": site, "state-dir": str(self.folder / "state"), "device": "cpu"}
        config |= trusting(self.folder)
        config |= {name.replace("_", "-"): value for name, value in declared.items()}
        words = (f"{name}={_toml(value)}" for name, value in config.items())
        self._start(
            site,
            f"flower-supernode --superlink 127.0.0.1:{self.entrance}",
            f"--root-certificates {own}/ca.crt --auth-supernode-private-key {own}/supernode",
            f"--host 127.0.0.1 --port {free_port()}",
            last=["--node-config", " ".join(words)],
        )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal a process and everything it started, in its session or in one of their own."""
        started, process = self.started_by(name), self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        process.wait()
        psutil.wait_procs(started, timeout=30)

    def started_by(self, name: str) -> list[psutil.Process]:
        """Return the living descendants of a process."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.processes[name].pid).children(recursive=True)
        return []

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for_port(self, port: int) -> None:
        def open_() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        wait_until(open_, 90, f"port {port} answers")

    # --- runs ------------------------------------------------------------------------------------

    def run(self, config: RunConfig) -> None:
        """Start a run; returns as soon as it is accepted."""
        words = " ".join(f"{k}={_toml(v)}" for k, v in config.flat().items())
        self.flwr("run", str(REPOSITORY), CONNECTION, "--run-config", words)

    def status(self) -> str:
        """Return Flower's status of the newest run."""
        runs = json.loads(self.flwr("ls", CONNECTION, "--format", "json"))["runs"]
        return str(max(runs, key=lambda run: run["pending-at"])["status"])

    def wait_for_status(self, config: RunConfig, wanted: set[str], seconds: float = 400) -> str:
        """Wait for the summary of a run to say how it ended; returns what it says."""
        path = Path(config.run.output_dir) / "summary.json"

        def ended() -> str:
            found = json.loads(path.read_text())["status"] if path.exists() else ""
            return found if found in wanted else ""

        return str(wait_until(ended, seconds, f"summary says {wanted}; {self.tails()}"))

    def rows(self, config: RunConfig) -> list[dict[str, float]]:
        path = Path(config.run.output_dir) / "metrics.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def wait_for_round(self, config: RunConfig, number: int, seconds: float = 400) -> None:
        wait_until(lambda: len(self.rows(config)) >= number, seconds, f"round {number} is done")

    def tails(self) -> str:
        return "\n".join(f"--- {n}\n{self.log(n)[-1500:]}" for n in self.processes)

    def flwr(self, *words: str) -> str:
        """Run Flower's command line, as the operator does."""
        (self._home("cli") / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.entrance}"\n'
            f'root-certificates = "{self.certs}/server/ca.crt"\n'
        )
        done = subprocess.run(
            [BIN / "flwr", *words], env=self.environment("cli"), capture_output=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
        return done.stdout.decode()

    # --- how -------------------------------------------------------------------------------------

    def _start(self, name: str, *parts: str, last: list[str] | None = None) -> None:
        words = [*" ".join(parts).split(), *(last or [])]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [BIN / words[0], *words[1:]],
                env=self.environment(name),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _home(self, name: str) -> Path:
        home = self.folder / "flwr" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a process of this federation."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
        return flower_environment(kept, home=self._home(name)) | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
        }


def _toml(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) and '"' in value else json.dumps(value)


class RecordingProxy:
    """A TCP proxy that keeps every byte of every connection, by direction."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.streams: list[bytearray] = []
        self.outlets: set[int] = set()  # the ports from which it went on to its target
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self._target)) as far,
        ):
            self.outlets.add(int(far.getsockname()[1]))
            back = threading.Thread(target=self._copy, args=(far, client), daemon=True)
            back.start()
            self._copy(client, far)
            back.join()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        stream = bytearray()
        self.streams.append(stream)
        with suppress(OSError):
            while data := source.recv(65536):
                stream.extend(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def tls_records(stream: Mapping[int, int] | bytes) -> list[int]:
    """Return the content types of the TLS records that a stream consists of.

    Raises ValueError at the first byte that does not belong to a record.
    """
    data, types, position = bytes(stream), [], 0
    while position + 5 <= len(data):
        kind, major, length = data[position], data[position + 1], data[position + 3 : position + 5]
        if kind not in (20, 21, 22, 23) or major != 3:
            raise ValueError(f"byte {position} starts no TLS record: {data[position:][:40]!r}")
        types.append(kind)
        position += 5 + int.from_bytes(length, "big")
    return types
