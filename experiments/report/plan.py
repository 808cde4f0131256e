"""From a sweep file to its cells: each combination of variant, grid values and seed is a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig
from common.errors import ConfigError, unknown_name
from common.files import output_root
from experiments.report.settings import digest, essential, value_text
from experiments.report.sweep_file import STUDIES, TRIALS, Settings, SweepFile, Variant
from experiments.report.tuning import are_done, reached
from experiments.run.presets import (
    EngineSection,
    Preset,
    find_toml,
    resolve_paths,
)

RESERVED = {
    "seed": "give seeds = [...] at the top",
    "output-dir": "give output-dir at the top; each cell has a folder of its own below it",
    "resume-from": "a cell that was cut off is resumed by the sweep itself",
    "num-partitions": "set num-clients instead",
}
LONGEST_NAME = 90


@dataclass(frozen=True, eq=False)
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
    settings: Settings
    grid: Settings
    after: Path | None = None

    def arguments(self, *, place: bool = True, resume: bool = False) -> list[str]:
        """Return the arguments of `mh-pfedhn` that run this cell, or go on with it.

        Without `place` they repeat it in a new folder.
        """
        settings = {k: v for k, v in self.settings.items() if k != "engine"}
        if source := self.folder if resume else self.after:
            settings["resume-from"] = str(source)
        if place:  # what clients keep must outlive the process, or there is nothing to resume
            settings.setdefault("state-dir", str(self.folder / "state"))
        pairs = [f"{key}={value_text(value)}" for key, value in settings.items()]
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
    is_trial: bool = False

    @classmethod
    def load(
        cls, name_or_file: str | Path, common: Settings | None = None, output_dir: str = ""
    ) -> Plan:
        """Read a sweep and check every cell of it, so that no typo shows up hours later.

        Takes a study of the project or a path that ends in .toml. `common` and `output_dir` win
        over the file's settings and place. Raises ConfigError on an unknown key, a value out of
        range, or the same run twice. Where settings are to be chosen, and not all trials have
        completed, the plan is that of the trials.
        """
        path = find_toml("study", str(name_or_file), STUDIES)
        try:
            content = SweepFile.load(path)
            folder = path.parent / Path(content.output_dir).expanduser()
            if output_dir or not content.output_dir:
                folder = Path(output_dir or output_root() / path.stem).expanduser()
            folder = folder.resolve()
            common, is_trial, apart = common or {}, False, folder.with_name(folder.name + TRIALS)
            if content.tune:
                tested = {**common, "tested-on": "validation"}
                cells = tuple(_cells(content.trials(), path, apart, tested))
                is_trial = not are_done(cell.folder for cell in cells)
            if not is_trial:
                content = content.settled(_best(cells)) if content.tune else content
                cells = tuple(_cells(content, path, folder, common))
            seen: dict[str, str] = {}
            for cell in cells:
                other = seen.setdefault(cell.name.rpartition("_")[2], cell.name)
                if other is not cell.name:
                    raise ConfigError(f"{other} and {cell.name} are the same run. Remove one.")
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from error
        keep = content.checkpoints == "keep"
        place = apart if is_trial else folder
        return cls(path, place, content.description, keep, cells, is_trial)


def _best(trials: Iterable[Cell]) -> dict[str, Settings]:
    """Return the grid values of each variant's best trial; of equal ones the first."""
    best: dict[str, Cell] = {}
    for cell in trials:
        other = best.setdefault(cell.variant, cell)
        if reached(cell.folder) > reached(other.folder):
            best[cell.variant] = cell
    return {variant: cell.grid for variant, cell in best.items()}


def _cells(content: SweepFile, path: Path, folder: Path, common: Settings) -> Iterator[Cell]:
    """Build all cells; a cell of a variant that goes on from another knows that one's folder."""
    made: dict[tuple[str, int], list[Cell]] = {}
    for name, variant in (content.variants or {"": Variant()}).items():
        grid = {**content.grid, **variant.grid}
        preset = variant.preset or content.preset
        if preset.endswith(".toml"):
            preset = str((path.parent / Path(preset).expanduser()).resolve())
        try:
            _check_keys([*content.fixed, *variant.settings, *grid, *common])
            for key in grid.keys() & variant.settings.keys():
                raise ConfigError(f"{key} is set by itself and in the grid. Keep one.")
            for values, seed in itertools.product(itertools.product(*grid.values()), content.seeds):
                chosen = dict(zip(grid, values, strict=True))
                merged = {**content.fixed, **variant.settings, **chosen, **common}
                settings = resolve_paths(merged, base=path.parent)
                config = _config(preset, settings, seed)
                source = _source(content, config, variant.after, made)
                cell_name = _name(name or path.stem, chosen, config, source)
                cell = Cell(
                    cell_name, folder / cell_name, preset, name, seed, config.run.rounds, settings,
                    chosen, source.folder if source else None,
                )  # fmt: skip
                made.setdefault((name, seed), []).append(cell)
                yield cell
        except ConfigError as error:
            raise ConfigError(f"variant {name!r}: {error}" if name else str(error)) from error


def _config(preset: str, settings: Settings, seed: int) -> RunConfig:
    """Build a cell's run config exactly as `mh-pfedhn run` will."""
    engine = {"name": settings["engine"]} if "engine" in settings else {}
    pairs = [f"{k}={value_text(v)}" for k, v in settings.items() if k != "engine"]
    loaded = Preset.load(preset).with_engine(engine).with_settings(pairs)
    return loaded.with_config({"seed": seed}).config


def _source(
    content: SweepFile, config: RunConfig, after: str, made: Mapping[tuple[str, int], list[Cell]]
) -> Cell | None:
    """Return the one run of an earlier variant that a cell goes on from, if it does."""
    if not after:
        return None
    found = made.get((after, config.run.seed), [])
    if len(found) != 1 or content.checkpoints != "keep":
        raise ConfigError(
            f"it comes after {after!r}, which must be a variant above it without a grid, and "
            'checkpoints = "keep" must stand at the top, or there is nothing to go on from.'
        )
    if config.run.rounds <= found[0].rounds:
        raise ConfigError(
            f"it goes on after round {found[0].rounds} of {after!r} and ends at round "
            f"{config.run.rounds}: it would do nothing. Its rounds count from the beginning; set "
            "more in the variant, and none with --set, which sets them for all."
        )
    return found[0]


def _name(stem: str, grid: Settings, config: RunConfig, source: Cell | None) -> str:
    """Name a cell after what was chosen and a hash of everything that decides its result."""
    parts = [stem, *(f"{key}={value_text(value)}" for key, value in grid.items())]
    slugs = (re.sub(r"[^A-Za-z0-9.=,+-]+", "-", part).strip("-") or "cell" for part in parts)
    decides = essential(config.flat())
    if source:  # what the source learned decides as well
        decides["after"] = source.name
    return f"{'_'.join(slugs)[:LONGEST_NAME]}_seed{config.run.seed}_{digest(decides)}"


def _check_keys(keys: Iterable[str]) -> None:
    known = RunConfig.key_names() | (EngineSection.key_names() - {"name"}) | {"engine"}
    for key in keys:
        if key in RESERVED:
            raise ConfigError(f"{key} cannot be set in a sweep: {RESERVED[key]}.")
        if key not in known:
            raise ConfigError(unknown_name("key", key, known))
