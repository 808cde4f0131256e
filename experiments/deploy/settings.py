"""What a participant declares: where the federation is, and its own node config."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common.config import NodeConfig, RunConfig
from common.config.keys import to_toml
from common.errors import ConfigError, unknown_name
from common.files import PRIVATE, replace_file, state_folder
from experiments.deploy import supernode
from experiments.deploy.contract import Contract, join_defaults
from experiments.run.engines.home import flower_environment, own_modules
from experiments.run.engines.processes import MARK
from experiments.run.presets import read_toml

PATH_KEYS = (
    *("data-dir", "cache-dir", "state-dir"),
    *("certificate", "key", "trusted-entities", "bundle"),
)
OWN_KEYS = ("bundle", "server", "certificate", "key", "insecure", "trusted-entities", "port")
MAY_NAME_CODE = ("model", "dataset", "global-model", "augmentation", "loss")
REQUIRED = {"client-id": "hospital-a", "server": "fl.example.org:8000"}
FLAGS = {
    "client-id": ("NAME", "your stable name in the federation"),
    "bundle": ("DIR", "what the operator handed you: certificate, key, contract"),
    "server": ("HOST:PORT", "the federation's SuperLink"),
    "certificate": ("CA.crt", "the federation's CA certificate"),
    "key": ("FILE", "your private key (ECDSA, OpenSSH format)"),
    "model": ("NAME", "of the zoo, or module:factory"),
    "dataset": ("NAME", "folder, module:function, or a known one"),
    "data-dir": ("DIR", "your pictures, for --dataset folder"),
    "state-dir": ("DIR", "what must survive restarts"),
    "device": ("NAME", "auto, cpu, cuda:0"),
}


@dataclass(frozen=True)
class JoinSettings:
    """Everything that `mh-pfedhn join` needs.

    `node` is the node config as Flower gets it: kebab-case keys, absolute paths. `base` holds the
    participant's own Python files. The SuperNode's own API listens on `port` of loopback; 0 means
    any that is free.
    """

    server: str
    certificate: Path | None
    key: Path | None
    insecure: bool
    trusted_entities: Path | None
    node: Mapping[str, Any]
    base: Path
    port: int = 0
    contract: Contract | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any], base: Path) -> Self:
        """Check the keys, make paths absolute, fill in what a joining participant means.

        Raises ConfigError where a key is unknown, something required is missing, or key and
        insecure contradict.
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
        settled, contract = join_defaults(_absolute(values, base))
        for key, example in REQUIRED.items():
            if not settled.get(key):
                raise ConfigError(f"join: {key} is missing, for instance --{key} {example}.")
        insecure = bool(settled.get("insecure", False))
        if insecure and (settled.get("key") or settled.get("certificate")):
            raise ConfigError(
                "join: insecure means no TLS: remove it, or both certificate and key."
            )
        port = settled.get("port", 0)
        if not isinstance(port, int) or not 0 <= port < 65536:
            raise ConfigError(f"join: port = {port!r} must be a whole number from 0 to 65535.")
        node = {k: v for k, v in settled.items() if k not in OWN_KEYS}
        node.setdefault("state-dir", str(_default_state_dir()))
        if "partition-id" not in node:
            node.setdefault("partition", "none")  # all examples are this participant's own
        NodeConfig.parse(node).client_section(RunConfig().client)
        return cls(
            server=str(settled["server"]),
            certificate=_path(settled.get("certificate")),
            key=_path(settled.get("key")),
            insecure=insecure,
            trusted_entities=_path(settled.get("trusted-entities")),
            node=node,
            base=base,
            port=port,
            contract=contract,
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
        """Return the SuperNode's command line; its own API stays on loopback, and its own."""
        settings = self.folder / "node-config.toml"
        replace_file(settings, to_toml(self.node), mode=PRIVATE)
        words = ["--superlink", self.server, "--node-config", str(settings)]
        words += ["--insecure"] if self.insecure else []
        for flag, path in (
            ("--root-certificates", self.certificate),
            ("--auth-supernode-private-key", self.key),
            ("--trusted-entities", self.trusted_entities),
        ):
            words += [flag, str(path)] if path is not None else []
        return supernode.command(self.folder / "api", port, words)

    def environment(self) -> dict[str, str]:
        """Return the SuperNode's environment; own code is found beside the settings."""
        names = [str(self.node.get(key, "")) for key in MAY_NAME_CODE]
        env = flower_environment(os.environ, home=self.folder / "flwr")
        return env | own_modules(names, self.base) | {MARK: self.mark}

    @property
    def mark(self) -> str:
        """What all that this process starts for the participant carries in its environment."""
        return f"{self.folder / 'flwr'}#{os.getpid()}"


def read_settings(args: argparse.Namespace) -> JoinSettings:
    """Merge file and flags; a flag wins. Paths in the file are relative to the file."""
    values: dict[str, Any] = {}
    base = Path.cwd()
    if args.file:
        path = Path(args.file).expanduser().resolve()
        base = path.parent
        values = _absolute(read_toml(path), base)
    for setting in args.set:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"join: --set {setting!r} must be KEY=VALUE.")
        values[key] = _scalar(value)
    given = {flag: getattr(args, flag.replace("-", "_")) for flag in (*FLAGS, "insecure")}
    given = {flag: value for flag, value in given.items() if value is not None}
    return JoinSettings.parse({**values, **_absolute(given, Path.cwd())}, base)


def _absolute(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    return {
        key: str(base / Path(value).expanduser())
        if key in PATH_KEYS and isinstance(value, str) and value
        else value
        for key, value in values.items()
    }


def _default_state_dir() -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "mh-pfedhn"


def _path(value: Any) -> Path | None:
    return Path(value) if value else None


def _scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
