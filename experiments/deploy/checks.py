"""What `mh-pfedhn join` checks before it starts anything, in the order in which things depend."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from rich.console import Console

from common.config import NodeConfig, RunConfig
from common.errors import ConfigError, MHpFedHNError
from common.files import printable, read_file
from experiments.console import say
from experiments.deploy.reach import UnreachableError, check_server
from experiments.deploy.rehearsal import (
    Finding,
    Trial,
    check_common,
    check_contract,
    check_data,
    check_model,
    check_training,
)
from experiments.deploy.settings import JoinSettings
from experiments.run.engines.processes import find_program

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red")}
MIN_FREE_BYTES = 1 << 30
MOST_TRUSTED = 1 << 20
"""Bytes of a file of keys."""


Check = Callable[[Trial], Finding]


def run_checks(settings: JoinSettings, console: Console, *, must_answer: bool) -> bool:
    """Run all checks and print the list; returns whether the participant can join.

    `must_answer` makes a server that cannot be reached a failure; a SuperNode that joins waits.
    """
    trial = Trial(settings, NodeConfig.parse(settings.node).client_section(RunConfig().client))
    checks: dict[str, Check] = {
        # peers of another minor version of Flower refuse each other
        "program": lambda _: Finding(
            f"{find_program('flower-supernode')}, Flower {version('flwr')}"
        ),
        "state folder": lambda t: check_folder(t.settings.folder),
        "key": lambda t: check_key(t.settings.key),
        **({"trusted": check_trusted} if settings.trusted_entities else {}),
        "data": check_data,
        **({"contract": check_contract} if settings.contract else {}),
        "model": check_model,
        "training": check_training,
        **({"common model": check_common} if settings.node.get("global-model") else {}),
        "server": lambda t: check_reach(t.settings, must_answer=must_answer),
    }
    passed = [_run(name, check, trial, console) for name, check in checks.items()]
    return all(passed)


def _run(name: str, check: Check, trial: Trial, console: Console) -> bool:
    try:
        with console.status(f"checking {name}"):
            found = check(trial)
    except Exception as error:  # a participant's model may raise anything: that is the finding
        kind = "" if isinstance(error, MHpFedHNError) else f"{type(error).__name__}: "
        _say(console, "failed", name, f"{kind}{error}")
        return False
    _say(console, "warning" if found.warning else "ok", name, f"{found.detail} {found.warning}")
    return True


def _say(console: Console, status: str, name: str, detail: str) -> None:
    mark, style = MARKS[status]
    say(console, mark, style=style, end=" ")
    say(console, f"{name:<13}{detail.strip()}")


def check_reach(settings: JoinSettings, *, must_answer: bool) -> Finding:
    """Find the server; one that is away is a warning, unless it must answer."""
    try:
        found = check_server(settings.server, settings.certificate, settings.insecure)
    except UnreachableError as error:
        if must_answer:
            raise
        return Finding("", str(error))
    return Finding("", found) if settings.insecure else Finding(found)


def check_folder(folder: Path) -> Finding:
    """Check that the participant's folder can be written, is closed to others, and has room."""
    probe = folder / ".probe"
    try:
        probe.write_text("x")
        probe.unlink()
        folder.chmod(0o700)  # statistics and the final model say something about the data
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror}. Choose another --state-dir."
        ) from error
    free = shutil.disk_usage(folder).free
    few = f"only {free / 1e6:.0f} MB are free" if free < MIN_FREE_BYTES else ""
    return Finding(f"{folder}, {free / 1e9:.1f} GB free", few)


def check_key(key: Path | None) -> Finding:
    """Check that the key is what Flower takes: a private key on a NIST curve, OpenSSH format."""
    make = "Make one: ssh-keygen -t ecdsa -b 384 -N '' -f KEY; send KEY.pub to the operator."
    if key is None:
        return Finding("none", "- fine only where the server asks for none (SuperNode auth off)")
    try:
        content = key.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {error.strerror}. {make}") from error
    if content.startswith((b"ssh-", b"ecdsa-")):
        raise ConfigError(f"{key} is the public key; give the private one (without .pub).")
    try:
        private = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{key} is no private key in OpenSSH format without passphrase ({error}). {make}"
        ) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key} is a {type(private).__name__}; Flower needs ECDSA. {make}")
    mode = stat.S_IMODE(key.stat().st_mode)
    open_to = f"but others can read it (mode {mode:o}): chmod 600 {key}" if mode & 0o077 else ""
    return Finding(f"{key}, {private.curve.name}", open_to)


def check_trusted(trial: Trial) -> Finding:
    """Check that somebody is trusted to sign apps: of none, Flower verifies nothing."""
    path = trial.settings.trusted_entities
    form = 'One "fpk_...: ssh-ed25519 ..." a line is expected: whose signature an app must have.'
    try:
        found = yaml.safe_load(read_file(Path(str(path)).resolve(), MOST_TRUSTED))
        keys = [load_ssh_public_key(key.encode()) for key in found.values()]
    except (OSError, RecursionError, yaml.YAMLError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {printable(str(error))}. {form}") from error
    except UnsupportedAlgorithm as error:
        raise ConfigError(f"{path} has a key of another kind: {error}. {form}") from error
    if not keys or not all(isinstance(key, ed25519.Ed25519PublicKey) for key in keys):
        raise ConfigError(f"{path} names nobody with an Ed25519 key to trust. {form}")
    return Finding(f"apps are signed by one of {len(keys)}, or refused")
