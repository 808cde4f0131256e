"""`mh-pfedhn join`: check everything a participant brings, then run and supervise its SuperNode."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape

from client_app.folders import state_folder
from common.config import NodeConfig, RunConfig
from common.errors import ConfigError, RunError, unknown_name
from common.files import PRIVATE, replace_file
from experiments.arguments import add_set_option
from experiments.run.presets import to_toml

PATH_KEYS = ("data-dir", "cache-dir", "state-dir", "certificate", "key", "trusted-entities")
OWN_KEYS = ("server", "certificate", "key", "insecure", "trusted-entities", "port")
PROGRAM = "flower-supernode"
CHECKS_FAILED = 1


@dataclass(frozen=True)
class JoinSettings:
    """What a participant declares: where the federation is, and its own node config.

    Attributes
    ----------
    node
        Node config as Flower gets it: kebab-case keys, absolute paths.
    base
        Folder that holds the participant's own Python files.
    port
        Where the SuperNode's own API listens on loopback; 0 means any that is free.
    """

    server: str
    certificate: Path | None
    key: Path | None
    insecure: bool
    trusted_entities: Path | None
    node: Mapping[str, Any]
    base: Path
    port: int = 0

    @classmethod
    def parse(cls, values: Mapping[str, Any], base: Path) -> Self:
        """Check the keys, make paths absolute, fill in what a joining participant means.

        Raises
        ------
        ConfigError
            A key is unknown, something required is missing, or key and insecure contradict.
        """
        known = {*OWN_KEYS, *NodeConfig.key_names()}
        for key in values:
            if key not in known and key in RunConfig.key_names():
                raise ConfigError(
                    f"join: {key} belongs to the run config, which whoever starts a run sets: "
                    "leave it out here."
                )
            if key not in known:
                raise ConfigError("join: " + unknown_name("key", key, known))
        settled = {k: _absolute(v, base) if k in PATH_KEYS else v for k, v in values.items()}
        for key, example in (("client-id", "hospital-a"), ("server", "fl.example.org:8000")):
            if not settled.get(key):
                raise ConfigError(f"join: {key} is missing, for instance --{key} {example}.")
        node = {k: v for k, v in settled.items() if k not in OWN_KEYS}
        node.setdefault("state-dir", str(_default_state_dir()))
        if "partition-id" not in node:
            node.setdefault("partition", "none")  # all examples are this participant's own
        NodeConfig.parse(node)
        insecure = bool(settled.get("insecure", False))
        if insecure and (settled.get("key") or settled.get("certificate")):
            raise ConfigError(
                "join: insecure means no TLS: remove it, or both certificate and key."
            )
        return cls(
            server=str(settled["server"]),
            certificate=_path(settled.get("certificate")),
            key=_path(settled.get("key")),
            insecure=insecure,
            trusted_entities=_path(settled.get("trusted-entities")),
            node=node,
            base=base,
            port=_port(settled.get("port", 0)),
        )

    @property
    def client_id(self) -> str:
        """The stable name of this participant."""
        return str(self.node["client-id"])

    @property
    def folder(self) -> Path:
        """The participant's own folder below the state-dir."""
        return state_folder(str(self.node["state-dir"]), self.client_id)

    def command(self, port: int) -> list[str]:
        """Return the SuperNode's command line; its own API stays on loopback."""
        settings = self.folder / "node-config.toml"
        replace_file(settings, to_toml(self.node), mode=PRIVATE)
        command = [find_program(), "--superlink", self.server, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--node-config", str(settings)]
        if self.insecure:
            command.append("--insecure")
        for flag, path in (
            ("--root-certificates", self.certificate),
            ("--auth-supernode-private-key", self.key),
            ("--trusted-entities", self.trusted_entities),
        ):
            command += [flag, str(path)] if path is not None else []
        return command

    def environment(self) -> dict[str, str]:
        """Return the SuperNode's environment: its own FLWR_HOME, quick polls, no telemetry."""
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        env = dict(os.environ) | {
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PATH": os.pathsep.join(programs),
        }
        if env.get("PYTHONDONTWRITEBYTECODE") and not env.get("PYTHONPYCACHEPREFIX"):
            # a process starts for every message: compiling its imports again would cost seconds
            env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.folder / "pyc")}
        if any(":" in str(self.node.get(name, "")) for name in ("model", "dataset")):
            paths = [os.environ.get("PYTHONPATH"), str(self.base)]
            env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        return env


def add_join_parser(subparsers: Any) -> None:
    """Add `join` to the command line."""
    command = subparsers.add_parser("join", help="take part in a federation with your own data")
    command.add_argument("file", nargs="?", metavar="FILE.toml", help="everything below, as a file")
    command.add_argument("--client-id", metavar="NAME", help="your stable name in the federation")
    command.add_argument("--server", metavar="HOST:PORT", help="the federation's SuperLink")
    command.add_argument("--certificate", metavar="CA.crt", help="the federation's CA certificate")
    command.add_argument("--key", metavar="FILE", help="your private key (ECDSA, OpenSSH format)")
    command.add_argument("--model", metavar="NAME", help="of the zoo, or module:factory")
    command.add_argument(
        "--dataset", metavar="NAME", help="folder, module:function, or a known one"
    )
    command.add_argument("--data-dir", metavar="DIR", help="your pictures, for --dataset folder")
    command.add_argument("--state-dir", metavar="DIR", help="what must survive restarts")
    command.add_argument("--device", metavar="NAME", help="auto, cpu, cuda:0")
    command.add_argument("--insecure", action="store_true", default=None, help="no TLS: tests only")
    command.add_argument("--check", action="store_true", help="only check, start nothing")
    add_set_option(command, "any other key of the node config")
    command.set_defaults(command=run_join)


def run_join(args: argparse.Namespace) -> int:
    """Check, then take part until stopped.

    Returns
    -------
    0 when everything asked is done, 1 when a check failed or the SuperNode cannot run.
    """
    from experiments.deploy.checks import run_checks
    from experiments.deploy.supervise import Supervisor

    console = Console() if sys.stdout.isatty() else Console(width=120)
    settings = read_settings(args)
    if str(settings.base) not in sys.path:
        sys.path.append(str(settings.base))
    _make_folder(settings.folder)
    with _only_one(settings.folder):
        if not run_checks(settings, console, must_answer=args.check):
            console.print("[bold red]not joined[/]: correct what failed above, then run it again")
            return CHECKS_FAILED
        if args.check:
            console.print("[bold green]ready[/]: without --check this participant joins")
            return 0
        console.print(
            f"joining {escape(settings.server)} as {escape(settings.client_id)}; everything of "
            f"this participant is in {escape(str(settings.folder))}; Ctrl-C leaves",
            highlight=False,
            soft_wrap=True,
        )
        return Supervisor(settings, console).run()


def read_settings(args: argparse.Namespace) -> JoinSettings:
    """Merge file and flags; a flag wins. Paths in the file are relative to the file."""
    values: dict[str, Any] = {}
    base = Path.cwd()
    if args.file:
        path = Path(args.file).expanduser().resolve()
        base = path.parent
        try:
            values = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"join: cannot read {path}: {error.strerror}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"join: {path} is no valid TOML: {error}.") from error
        values = {k: _absolute(v, base) if k in PATH_KEYS else v for k, v in values.items()}
    for setting in args.set:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"join: --set {setting!r} must be KEY=VALUE.")
        values[key] = _scalar(value)
    flags = ("client-id", "server", "certificate", "key", "model", "dataset", "data-dir")
    for flag in (*flags, "state-dir", "device", "insecure"):
        value = getattr(args, flag.replace("-", "_"))
        if value is not None:
            values[flag] = _absolute(value, Path.cwd()) if flag in PATH_KEYS else value
    return JoinSettings.parse(values, base)


def find_program(name: str = PROGRAM) -> str:
    """Return the path of one of Flower's programs, preferably beside this Python.

    Raises
    ------
    RunError
        Flower is not installed here.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RunError(f"{name} is not installed: `pip install 'flwr==1.41.*'` in this Python.")
    return found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"join: {folder} cannot be made: {error.strerror}. Choose another --state-dir."
        ) from error


def _default_state_dir() -> Path:
    root = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(root) / "mh-pfedhn"


def _absolute(value: Any, base: Path) -> Any:
    return str(base / Path(value).expanduser()) if isinstance(value, str) and value else value


def _path(value: Any) -> Path | None:
    return Path(value) if value else None


def _port(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 65536:
        raise ConfigError(f"join: port = {value!r} must be a whole number from 0 to 65535.")
    return value


def _scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the participant's folder: two nodes under one name would be refused by the server."""
    with (folder / "join.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                f"another `mh-pfedhn join` (process {file.read() or '?'}) already runs with "
                f"{folder}. Stop it, or choose another client-id."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
