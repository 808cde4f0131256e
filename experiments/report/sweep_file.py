"""What a sweep file says: every combination of variant, grid values and seed is one run.

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

    [tune]                           # the grid holds candidates, of which each variant keeps one:
    seed = 11                        # by validation accuracy with this seed (`report.tuning`)

A later table wins: preset, fixed, variant, grid, what the command line says, seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config.section import Scalar, kebab
from common.errors import ConfigError, unknown_name
from experiments.run.presets import CONFIGS, read_toml

STUDIES, TRIALS = CONFIGS / "studies", "-trials"
Settings = dict[str, Scalar]
Grid = dict[str, Annotated[list[Scalar], Field(min_length=1)]]


class Variant(BaseModel):
    """A method with settings, a preset and a grid of its own; other keys are settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    preset: str = ""
    after: str = ""
    grid: Grid = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the variant itself."""
        return self.model_extra or {}


class Tune(BaseModel):
    """How each variant's grid values are chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int


class SweepFile(BaseModel):
    """What a sweep file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=kebab)

    description: str = ""
    preset: str
    seeds: list[int] = Field([42], min_length=1)
    output_dir: str = ""
    checkpoints: Literal["embeddings", "keep"] = "embeddings"
    fixed: Settings = {}
    grid: Grid = {}
    variants: dict[str, Variant] = {}
    tune: Tune | None = None

    @property
    def num_runs(self) -> int:
        """Runs that the whole sweep takes, trials among them; nothing is checked."""
        variants = (self.variants or {"": Variant()}).values()
        grids = [
            math.prod(len(values) for values in (self.grid | variant.grid).values())
            for variant in variants
        ]
        if self.tune:
            return sum(count for count in grids if count > 1) + len(grids) * len(self.seeds)
        return sum(grids) * len(self.seeds)

    def trials(self) -> SweepFile:
        """Return the sweep that tries all candidates, where a variant has several."""
        assert self.tune
        several = {
            name: variant
            for name, variant in (self.variants or {"": Variant()}).items()
            if any(len(values) > 1 for values in (self.grid | variant.grid).values())
        }
        return self.model_copy(update={"variants": several, "seeds": [self.tune.seed]})

    def settled(self, best: Mapping[str, Settings]) -> SweepFile:
        """Return the sweep in which each variant has these settings; one without its only ones."""
        settled = {}
        for name, variant in (self.variants or {"": Variant()}).items():
            only = {key: values[0] for key, values in (self.grid | variant.grid).items()}
            rest = variant.model_dump(exclude={"grid"})
            settled[name] = Variant.model_validate(rest | best.get(name, only))
        return self.model_copy(update={"grid": {}, "variants": settled})

    @classmethod
    def load(cls, path: Path) -> SweepFile:
        """Read a file; raise ConfigError that says what a sweep file has."""
        tables = read_toml(path)
        known = {kebab(name) for name in cls.model_fields}
        for key in tables.keys() - known:
            raise ConfigError(unknown_name("key", key, known))
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
            raise ConfigError(
                f"{where}: {first['msg']} (got {first['input']!r}). A sweep file has preset = "
                '"NAME", seeds = [1, 2], [fixed], [grid] with a list for each key, and '
                "[variants.NAME], each with settings and, where wanted, [variants.NAME.grid]."
            ) from error
