"""From a sweep file to its cells: every combination of variant, grid values and seed is one run.

    preset = "quickstart"            # what all cells start from; a name or a file beside this one
    seeds = [1, 2, 3]
    [fixed]                          # settings of all cells, as behind `mh-pfedhn run --set`
    rounds = 10
    [grid]                           # lists: every combination
    distill-alpha = [0.02, 0.2]
    [variants.local]                 # a method with settings, a preset or a grid of its own
    method = "local"
    [variants.later]                 # goes on from another variant's run with the same seed
    after = "local"                  # wants checkpoints = "keep"

A later table wins: preset, fixed, variant, grid, what the command line says, seed.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config import RunConfig
from common.config.section import Scalar
from common.errors import ConfigError, unknown_name
from experiments.report.runs import output_root
from experiments.report.settings import digest, essential
from experiments.run.presets import CONFIGS, PATH_KEYS, EngineSection, Preset

RESERVED = {
    "seed": "give seeds = [...] at the top",
    "output-dir": "give output-dir at the top; each cell has a folder of its own below it",
    "resume-from": "a cell that was cut off is resumed by the sweep itself",
    "num-partitions": "set num-clients instead",
}
Settings = dict[str, Scalar]
STUDIES = CONFIGS / "studies"


class SweepFile(BaseModel):
    """What a sweep file may say."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda n: n.replace("_", "-")
    )

    description: str = ""
    preset: str
    seeds: list[int] = Field([42], min_length=1)
    output_dir: str = ""
    checkpoints: str = Field("embeddings", pattern="^(embeddings|keep)$")
    fixed: Settings = {}
    grid: dict[str, list[Scalar]] = {}
    variants: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    `settings` are the overrides of the preset without the seed; `grid` is the part of them that
    the grid chose. `after` is the folder of the run that this one goes on from.
    """

    name: str
    folder: Path
    preset: str
    variant: str
    seed: int
    rounds: int
    settings: Settings = field(hash=False)
    grid: Settings = field(hash=False)
    after: Path | None = None

    def arguments(self, *, place: bool = True, resume: bool = False) -> list[str]:
        """Return the arguments of `mh-pfedhn` that run this cell, or go on with it.

        Without `place` they repeat it in a new folder.
        """
        settings = {k: v for k, v in self.settings.items() if k != "engine"}
        pairs = [f"{key}={value_text(value)}" for key, value in settings.items()]
        source = self.folder if resume else self.after
        pairs += [f"resume-from={source}"] if source else []
        engine = self.settings.get("engine")
        return [
            "run", self.preset,
            *(["--engine", str(engine)] if engine else []),
            "--seed", str(self.seed),
            *(["--output-dir", str(self.folder)] if place else []),
            *(["--set", *pairs] if pairs else []),
        ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A sweep: where its runs go, and all its cells in the order in which they run."""

    file: Path
    folder: Path
    description: str
    keep_checkpoints: bool
    cells: tuple[Cell, ...]

    @classmethod
    def load(
        cls, name_or_file: str | Path, common: Settings | None = None, output_dir: str = ""
    ) -> Plan:
        """Read a sweep and check every cell of it, so that no typo shows up hours later.

        Parameters
        ----------
        name_or_file
            A study that comes with the project, or a path that ends in .toml.
        common
            Settings of all cells that win over the file's.
        output_dir
            Where the cells go; empty: where the file says.

        Raises
        ------
        ConfigError
            Not a sweep file, an unknown key (the nearest is named), a value out of range, or two
            cells that are the same run.
        """
        path = find_sweep(str(name_or_file))
        content = _read(path)
        folder = output_root() / path.stem
        if content.output_dir:
            folder = (path.parent / Path(content.output_dir).expanduser()).resolve()
        if output_dir:
            folder = Path(output_dir).expanduser().resolve()
        cells = tuple(_cells(content, path, folder, common or {}))
        _require_different(cells, path)
        return cls(path, folder, content.description, content.checkpoints == "keep", cells)


def study_names() -> list[str]:
    """Return the names of the studies that come with the project, sorted."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def find_sweep(name_or_file: str) -> Path:
    """Return the sweep file that is meant; raise ConfigError for a study that is not there."""
    if name_or_file.endswith(".toml"):
        return Path(name_or_file).expanduser().resolve()
    path = STUDIES / f"{name_or_file}.toml"
    if not path.is_file():
        raise ConfigError(
            unknown_name("study", name_or_file, study_names())
            + " Or give the path of a sweep file, which ends in .toml."
        )
    return path


def value_text(value: Scalar) -> str:
    """Write a value as it stands behind `--set key=`.

    >>> value_text(True), value_text(0.02), value_text("cnn,mlp")
    ('true', '0.02', 'cnn,mlp')
    """
    return value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> SweepFile:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read sweep file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    known = {name.replace("_", "-") for name in SweepFile.model_fields}
    for key in tables:
        if key not in known:
            raise ConfigError(f"{path.name}: " + unknown_name("key", key, known))
    try:
        return SweepFile.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        raise ConfigError(
            f"{path.name}: {where}: {first['msg']} (got {first['input']!r}). A sweep file has "
            'preset = "NAME", seeds = [1, 2], [fixed], [grid] with a list for each key, and '
            "[variants.NAME]."
        ) from error


def _cells(content: SweepFile, path: Path, folder: Path, common: Settings) -> Iterator[Cell]:
    _check_keys(list(common), path)
    variants = content.variants or {"": {}}
    made: dict[tuple[str, int], list[Cell]] = {}
    for variant, own in variants.items():
        settings = {k: v for k, v in own.items() if k not in ("grid", "preset", "after")}
        grid = {**content.grid, **_own_grid(own, variant, path)}
        _check_keys([*content.fixed, *settings, *grid], path)
        for key in grid:
            if not grid[key]:
                raise ConfigError(f"{path.name}: grid: {key} has no values. Give it at least one.")
            if key in settings:
                raise ConfigError(
                    f"{path.name}: {key} is set in variant {variant!r} and in its grid. Keep one."
                )
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            for seed in content.seeds:
                base = own.get("preset", content.preset)
                merged = {**content.fixed, **settings, **chosen, **common}
                draft = _Draft(path, folder, base, variant, seed)
                if "after" in own:
                    draft = replace(draft, after=_source(content, draft, own["after"], made))
                cell = _cell(draft, merged, chosen)
                _check_goes_on(draft, cell)
                made.setdefault((variant, seed), []).append(cell)
                yield cell


def _source(
    content: SweepFile, draft: _Draft, after: str, made: Mapping[tuple[str, int], list[Cell]]
) -> Cell:
    """Return the one run of an earlier variant that a cell goes on from."""
    found = made.get((after, draft.seed), [])
    if len(found) != 1 or content.checkpoints != "keep":
        raise ConfigError(
            f"{draft.path.name}: variant {draft.variant!r} comes after {after!r}: that must be a "
            'variant above it without a grid, and checkpoints = "keep" must stand at the top, or '
            "there is nothing to go on from."
        )
    return found[0]


def _check_goes_on(draft: _Draft, cell: Cell) -> None:
    source = draft.after
    if source is not None and cell.rounds <= source.rounds:
        raise ConfigError(
            f"{draft.path.name}: variant {draft.variant!r} goes on after round {source.rounds} of "
            f"{source.variant!r} and ends at round {cell.rounds}: it would do nothing. Its rounds "
            "count from the beginning; set more in the variant, and none with --set, which "
            "sets them for all."
        )


@dataclass(frozen=True)
class _Draft:
    path: Path
    folder: Path
    preset: str
    variant: str
    seed: int
    after: Cell | None = None


def _cell(draft: _Draft, settings: Settings, grid: Settings) -> Cell:
    path = draft.path
    settings = {key: _absolute(key, value, path.parent) for key, value in settings.items()}
    preset = draft.preset
    if preset.endswith(".toml"):
        preset = str((path.parent / Path(preset).expanduser()).resolve())
    try:
        config = _resolve(preset, settings, draft.seed)
    except ConfigError as error:
        where = f" variant {draft.variant!r}," if draft.variant else ""
        raise ConfigError(f"{path.name}:{where} {error}") from error
    parts = [draft.variant or path.stem, *(f"{key}={value_text(v)}" for key, v in grid.items())]
    stem = "_".join(_slug(part) for part in parts)[:90]
    decides = essential(config.flat())
    if draft.after is not None:  # what the source learned decides as well
        decides["after"] = draft.after.name
    source = draft.after.folder if draft.after else None
    name = f"{stem}_seed{draft.seed}_{digest(decides)}"
    return Cell(
        name, draft.folder / name, preset, draft.variant, draft.seed, config.run.rounds,
        settings, grid, source,
    )  # fmt: skip


def _resolve(preset: str, settings: Settings, seed: int) -> RunConfig:
    """Build the cell's run config exactly as `mh-pfedhn run` will."""
    engine = {"name": settings["engine"]} if "engine" in settings else {}
    pairs = [f"{k}={value_text(v)}" for k, v in settings.items() if k != "engine"]
    loaded = Preset.load(preset).with_engine(engine).with_settings(pairs)
    return loaded.with_config({"seed": seed}).config


def _own_grid(own: Mapping[str, Any], variant: str, path: Path) -> dict[str, list[Scalar]]:
    grid = own.get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(v, list) for v in grid.values()):
        raise ConfigError(
            f"{path.name}: the grid of variant {variant!r} must be a table with a list for each "
            f"key, got {grid!r}. Write [variants.{variant}.grid] and, below it, key = [1, 2]."
        )
    return grid


def _check_keys(keys: list[str], path: Path) -> None:
    known = RunConfig.key_names() | (EngineSection.key_names() - {"name"}) | {"engine"}
    for key in keys:
        if key in RESERVED:
            raise ConfigError(f"{path.name}: {key} cannot be set in a sweep: {RESERVED[key]}.")
        if key not in known:
            raise ConfigError(f"{path.name}: " + unknown_name("key", key, known))


def _require_different(cells: tuple[Cell, ...], path: Path) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        mark = cell.name.rpartition("_")[2]
        if mark in seen:
            raise ConfigError(
                f"{path.name}: {seen[mark].name} and {cell.name} are the same run. Remove one, or "
                "the repeated value."
            )
        seen[mark] = cell


def _absolute(key: str, value: Scalar, base: Path) -> Scalar:
    if key in PATH_KEYS and isinstance(value, str) and value:
        return str((base / Path(value).expanduser()).resolve())
    return value


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=,+-]+", "-", text).strip("-") or "cell"
