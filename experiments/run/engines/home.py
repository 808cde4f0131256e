"""A run's own FLWR_HOME: the folder, the environment of its processes, the app they are given."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

import client_app
import common
import server_app
from common.config import RunConfig
from common.config.keys import to_toml
from experiments.run.engines import processes

PREFIX = "mhp-"
APP = """\
[project]
name = "mh-pfedhn"
version = "0.1.0"
description = "Model-heterogeneous personalised federated learning with a hypernetwork"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "mh-pfedhn"

[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"

[tool.flwr.app.config]
"""
_LOCAL = "127.0.0.1,localhost"
CLUSTER = "RAY_ADDRESS"  # Ray's own variable: where a cluster runs that this user has started


def new_home() -> Path:
    """Create a run's temporary folder; it says which process owns it."""
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base()))
    (home / "owner").write_text(str(os.getpid()))
    return home


def remove_abandoned_homes() -> None:
    """Stop and remove this user's runs whose command line was killed before it could clean up."""
    for home in _base().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            mine = not hasattr(os, "getuid") or home.stat().st_uid == os.getuid()
            if mine and not psutil.pid_exists(int((home / "owner").read_text())):
                processes.stop_marked(str(home))
                shutil.rmtree(home, ignore_errors=True)


def _base() -> Path:
    # Ray's socket paths must stay under about 100 characters, so not below a long $TMPDIR.
    return Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())


def flower_environment(base: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: own FLWR_HOME, quiet, quick to start.

    `base` is what to build on, mostly os.environ; it is left unchanged.
    """
    env = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": processes.program_path(base),
    }
    for key in ("NO_PROXY", "no_proxy"):  # a company's proxy must not see loopback traffic
        env[key] = ",".join(filter(None, [base.get(key), _LOCAL]))
    return {**base, **env, **bytecode_cache(base)}


def own_modules(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Return a PYTHONPATH with `folder` if one of the names is a user's own "module:factory".

    Only then: a file of the user's that is called like a library's module would hide it.
    """
    if not any(":" in name for name in names):
        return {}
    path = [os.environ.get("PYTHONPATH"), str(folder)]
    return {"PYTHONPATH": os.pathsep.join(part for part in path if part)}


def child_environment(base: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """Return the environment of a run's processes: isolated, and marked with the run's FLWR_HOME.

    By the mark `processes.stop_marked` finds them. A Ray of the run's own keeps its files in
    `home`; a cluster that `base` names has a place of its own for them.
    """
    env = flower_environment(base, home=home) | {
        processes.MARK: str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_prestart_worker_first_driver": "0",  # Flower's actors cannot use those workers
    }
    return env if base.get(CLUSTER) else env | {"RAY_TMPDIR": str(home)}


def bytecode_cache(base: Mapping[str, str]) -> dict[str, str]:
    """Return variables that give Python a bytecode cache where `base` forbids it to write any.

    A run starts a dozen Python processes that import the same libraries. Without bytecode beside
    the sources each compiles torch, ray and flwr again: measured on two cores, 60 s instead of
    22 s until the end of a three-round toy run.
    """
    if not base.get("PYTHONDONTWRITEBYTECODE") or base.get("PYTHONPYCACHEPREFIX"):
        return {}
    cache = Path(base.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mh-pfedhn" / "bytecode"
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}


def stage_app(target: Path) -> None:
    """Write the Flower app of this installation, a checkout or a wheel, to a new folder `target`.

    `flwr run` packs the folder that holds a pyproject.toml, and overrides only keys of its config
    table.
    """
    target.mkdir(parents=True)
    for package in (server_app, client_app, common):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package.__path__[0], target / package.__name__, ignore=ignored)
    (target / "pyproject.toml").write_text(APP + to_toml(RunConfig().flat()), encoding="utf-8")
