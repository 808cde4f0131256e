"""Experiments as files: a description, where to run (`[engine]`), and run config keys (`[config]`).

A preset is a TOML file in `experiments/configs`; a researcher's own file has the same form. What
the file leaves out has its default (`common.config`). A typo anywhere is an error that names the
nearest key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeInt

from common.config import RunConfig
from common.config.section import Scalar, Section, key, require_known
from common.errors import ConfigError, unknown_name

CONFIGS = Path(__file__).parents[1] / "configs"
PATH_KEYS = ("data-dir", "cache-dir", "output-dir", "state-dir", "resume-from")
TABLES = ("description", "engine", "config")


class EngineSection(Section):
    """Where an experiment runs and what each client may use."""

    name: Literal["ray", "inprocess"] = key("ray", "where it runs: Flower's simulation, or here")
    num_clients: int = key(10, "simulated clients; each has one partition", ge=1)
    client_cpus: int = key(1, "of a client that computes", unit="CPUs", where="ray", ge=1)
    client_gpus: float = key(
        0.0, "schedules clients, does not limit their memory", unit="GPUs", where="ray", ge=0
    )
    workers: int = key(0, "clients that compute at once; 0: as many as the CPUs allow", ge=0)
    batched_clients: NonNegativeInt | Literal["auto"] = key(
        "auto",
        "clients of one architecture that are trained in one batched call; 0: one by one, which is "
        "faster on a CPU; auto: on a GPU as many as wait and its memory holds",
        where="inprocess",
    )


@dataclass(frozen=True)
class Preset:
    """One experiment, ready to run."""

    name: str
    description: str
    engine: EngineSection
    config: RunConfig

    @classmethod
    def load(cls, name_or_file: str) -> Self:
        """Read a preset by name, or any TOML file of the same form.

        Raises ConfigError that names what is not there, not TOML, unknown or out of range.
        """
        path = find_toml("preset", name_or_file, CONFIGS)
        tables = read_toml(path)
        for name in tables:
            if name not in TABLES:
                raise ConfigError(f"{path.name}: " + unknown_name("table", name, TABLES))
        engine = EngineSection.checked(
            _table(tables, "engine", path), where=f"{path.name} [engine]"
        )
        config = resolve_paths(_table(tables, "config", path), base=path.parent)
        blank = cls(path.stem, str(tables.get("description", "")), engine, RunConfig())
        try:
            return blank.with_config(config)
        except ConfigError as error:
            raise ConfigError(f"{path.name} [config]: {error}") from error

    def with_config(self, overrides: Mapping[str, Any]) -> Self:
        """Return a copy with some run config keys replaced.

        The number of partitions is the number of clients: each client has one. Raises ConfigError
        where a key is unknown or a value is out of range.
        """
        if "num-partitions" in overrides:
            raise ConfigError(
                "run config: num-partitions cannot be set here: each client of a simulation has "
                "one partition. Set the number of clients (--clients N, or num-clients in "
                "[engine])."
            )
        synced = {**overrides, "num-partitions": self.engine.num_clients}
        return replace(self, config=self.config.with_overrides(synced))

    def changes_from(self, other: Preset) -> dict[str, Scalar]:
        """Return the settings that differ from those of another preset; where things lie aside."""
        mine, theirs = (
            {**p.engine.flat(), **p.config.flat(), "engine": p.engine.name} for p in (self, other)
        )
        aside = {"name", "num-partitions", *PATH_KEYS}
        return {k: v for k, v in mine.items() if k not in aside and v != theirs[k]}

    def with_engine(self, overrides: Mapping[str, Any]) -> Self:
        """Return a copy with some engine keys replaced; raise ConfigError on a bad one."""
        engine = EngineSection.checked({**self.engine.flat(), **overrides}, where="engine")
        return replace(self, engine=engine).with_config({})

    def with_settings(self, assignments: Iterable[str]) -> Self:
        """Apply `key=value` texts; a key belongs to the run config or to the engine.

        Raises ConfigError where a text has no "=", a key is unknown or a value cannot be used.
        """
        pairs = dict(parse_assignment(text) for text in assignments)
        engine_keys = EngineSection.key_names() - {"name"}
        known = RunConfig.key_names() | engine_keys
        require_known(pairs, known, "--set")
        engine = {k: v for k, v in pairs.items() if k in engine_keys}
        config = {k: v for k, v in pairs.items() if k not in engine_keys}
        return self.with_engine(engine).with_config(resolve_paths(config, base=Path.cwd()))


def preset_names(folder: Path = CONFIGS) -> list[str]:
    """Return the names of the presets, or of the experiment files in another folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def find_toml(kind: str, name_or_file: str, folder: Path) -> Path:
    """Return the file that is meant; raise ConfigError for a name that `folder` does not have."""
    if name_or_file.endswith(".toml"):
        return Path(name_or_file).expanduser().resolve()
    path = folder / f"{name_or_file}.toml"
    if not path.is_file():
        raise ConfigError(
            unknown_name(kind, name_or_file, preset_names(folder))
            + " Or give the path of a .toml file of the same form."
        )
    return path


def parse_assignment(text: str) -> tuple[str, str]:
    """Split `key=value`; raise ConfigError where there is no "="."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set expects key=value, got {text!r}. Example: --set server-lr=0.001")
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return key.strip().replace("_", "-"), value


def resolve_paths(config: Mapping[str, Any], *, base: Path) -> dict[str, Any]:
    """Resolve the paths in a config against `base`: no process of a run has the user's cwd."""
    paths = {
        key: str((base / Path(value).expanduser()).resolve())
        for key, value in config.items()
        if key in PATH_KEYS and isinstance(value, str) and value
    }
    return {**config, **paths}


def _table(tables: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path.name}: {name} must be a table: write [{name}] above its keys.")
    return table


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file; raise ConfigError where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a thousand brackets
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
