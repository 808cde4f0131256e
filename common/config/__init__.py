"""Run config and node config: parsed once, bad values rejected with the key that is wrong.

Flower's run config is a flat table of kebab-case keys with scalar values. Here it becomes one
frozen object with a section per concern, so that a function receives the section it needs. The
defaults of the sections are the published settings (`method.md`; arXiv 2507.22330).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from common.config.baselines import BaselineSection
from common.config.client import ClientSection, WireSection
from common.config.combinations import check_together
from common.config.section import HeadSharing, Scalar, Section, kebab
from common.errors import ConfigError, unknown_name
from common.methods import METHODS, known_method

BY_SIZE = -1.0
"""A gain that follows from the number of clients of a head group (`least_squares`)."""


class RunSection(Section):
    """What to run, for how long, and where results go.

    `novel_only` freezes everything that the checkpoint of `resume_from` holds: only clients that
    are new to it learn. `client_keys` says whether a client-id is bound to the SuperNode key that
    first used it: "auto" binds where the operator registered the SuperNode under a name.
    """

    method: Annotated[str, AfterValidator(known_method)] = "mh-pfedhn-gd"
    rounds: int = Field(28, ge=1)
    seed: int = Field(42, ge=0)
    evaluation: Literal["separate", "fused"] = "separate"
    evaluate_every: int = Field(1, ge=1)
    output_dir: str = ""
    run_name: str = ""
    resume_from: str = ""
    novel_only: bool = False
    client_keys: Literal["auto", "bind", "ignore"] = "auto"
    checkpoint_every: int = Field(10, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    server_device: str = "cpu"


class ScheduleSection(Section):
    """Who trains when: the two numbers of `docs/parallel-updates.md`, and patience with stragglers.

    `max_in_flight` 0 means everybody at once; `buffer_size` 0 means as many as are in flight.
    A client that was asked `round_deadline_s` ago (0: no limit) is passed over, all that are still
    awaited when `close_fraction` have answered; a round closes when `min_fraction` have and nobody
    is left to ask. `clip_to_median` is the multiple of the median norm of its head
    group's earlier deltas that a delta is scaled down to; 0 leaves deltas as they are.
    """

    max_in_flight: int = Field(0, ge=0)
    buffer_size: int = Field(0, ge=0)
    min_clients: int = Field(1, ge=1)
    wait_for_clients_s: float = Field(300.0, ge=0)
    close_fraction: float = Field(1.0, gt=0, le=1)
    min_fraction: float = Field(0.5, ge=0, le=1)
    round_deadline_s: float = Field(0.0, ge=0)
    message_timeout_s: float = Field(3600.0, gt=0)
    max_staleness: int = Field(20, ge=0)
    max_delta_norm: float = Field(1e4, gt=0)
    clip_to_median: float = Field(0.0, ge=0)


class HypernetSection(Section):
    """Shape of the hypernetwork (method.md, "Hypernetwork").

    `head_init` "torch" draws weights and biases of the heads as the authors do; "shared" sets the
    weights to zero, so that all clients of a group start from one and the same model, the bias;
    "zero" sets both to zero, for clients with a `theta-offset`.
    `head_sharing` says who shares a group (`server_app.hypernet.groups`), "chunks" as published;
    `sharing_tolerance` is that of "tolerance".
    """

    chunk_size: int = Field(3072, ge=1)
    embed_dim: int = Field(64, ge=1)
    hidden_dim: int = Field(32, ge=1)
    embedding_std: float = Field(1.0, ge=0)
    head_init: Literal["torch", "shared", "zero"] = "zero"
    head_sharing: HeadSharing = "chunks"
    sharing_tolerance: float = Field(0.25, gt=0)
    max_parameters: int = Field(12_000_000, ge=1)


class UpdateSection(Section):
    """The server's optimiser (method.md, "One MH-pFedHN round as published").

    `server_rule` "adam" is the published one for everything. "least-squares" moves the heads so
    that the generated parameters go where the deltas point, at gains of their own for what a
    group's clients share and for what is each one's own (`server_app.aggregation.least_squares`);
    trunk and embeddings keep Adam, or stand still where both rates are 0, which makes a step
    cheaper. -1 for `shared_momentum` or `personal_gain` means what fits the number of clients of a
    head group and of rounds.
    """

    server_rule: Literal["adam", "least-squares"] = "least-squares"
    shared_gain: float = Field(1.0, ge=0)
    shared_momentum: float = Field(BY_SIZE, lt=1)
    personal_gain: float = Field(BY_SIZE)
    kernel_damping: float = Field(1e-3, gt=0)
    server_lr: float = Field(2e-4, ge=0)
    embedding_lr: float = Field(2e-4, ge=0)
    lr_decay_from: float = Field(0.6, ge=0, le=1)

    @field_validator("shared_momentum", "personal_gain")
    @classmethod
    def _by_size_or_positive(cls, value: float) -> float:
        if value < 0 and value != BY_SIZE:
            raise ValueError("set 0 or more, or -1 for what fits the size of a head group")
        return value


class TrainingSection(Section):
    """Local training of one client in one round (method.md, "Local training").

    `training_precision` "bfloat16" computes the products of forward and backward in it; weights,
    losses, optimiser and tests stay float32.
    """

    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(2e-3, ge=0)
    client_clip_norm: float = Field(50.0, gt=0)
    training_precision: Literal["float32", "bfloat16"] = "float32"


class DistillSection(Section):
    """MH-pFedHNGD: the global model and the distillation from it (paper section 3.3)."""

    global_model: str = "cnn"
    gd_mode: Literal["separate", "fused"] = "separate"
    distill_alpha: float = Field(0.02, ge=0, le=1)
    distill_temperature: float = Field(10.0, gt=0)


class RunConfig(BaseModel):
    """The whole run config, one section per concern."""

    model_config = ConfigDict(frozen=True)

    run: RunSection = RunSection()
    schedule: ScheduleSection = ScheduleSection()
    hypernet: HypernetSection = HypernetSection()
    update: UpdateSection = UpdateSection()
    training: TrainingSection = TrainingSection()
    distill: DistillSection = DistillSection()
    baseline: BaselineSection = BaselineSection()
    client: ClientSection = ClientSection()
    wire: WireSection = WireSection()

    sections: ClassVar[dict[str, type[Section]]] = {
        "run": RunSection,
        "schedule": ScheduleSection,
        "hypernet": HypernetSection,
        "update": UpdateSection,
        "training": TrainingSection,
        "distill": DistillSection,
        "baseline": BaselineSection,
        "client": ClientSection,
        "wire": WireSection,
    }

    @classmethod
    def key_names(cls) -> set[str]:
        """Return every key of the run config."""
        return set().union(*(section.key_names() for section in cls.sections.values()))

    @classmethod
    def parse(cls, flat: Mapping[str, Any]) -> Self:
        """Build the config from flat kebab-case keys; keys left out keep their default.

        Raises
        ------
        ConfigError
            A key is unknown (the nearest one is named) or a value is out of range.
        """
        known = cls.key_names()
        for key in flat:
            if key not in known:
                raise ConfigError("run config: " + unknown_name("key", key, known))
        parts = {
            name: _validated(section, _pick(flat, section), "run config")
            for name, section in cls.sections.items()
        }
        config = cls.model_validate(parts)
        check_together(config)
        return config

    def flat(self) -> dict[str, Scalar]:
        """Return all keys and values, as Flower's run config wants them."""
        merged: dict[str, Scalar] = {}
        for name in self.sections:
            merged |= getattr(self, name).flat()
        return merged

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """Return a copy with some keys replaced, validated like the whole."""
        return self.parse({**self.flat(), **overrides})

    @property
    def distils(self) -> bool:
        """Whether the run has a global model (MH-pFedHNGD)."""
        return self.run.method == "mh-pfedhn-gd"

    @property
    def is_baseline(self) -> bool:
        """Whether the method is not this project's own."""
        return METHODS[self.run.method].is_baseline

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a registration that every client must fill in, beside its sizes."""
        by_tag = self.hypernet.head_sharing == "tag" and not self.is_baseline
        return METHODS[self.run.method].needs + (("group",) if by_tag else ())


class NodeConfig(Section):
    """What one participant declares about itself (`--node-config`). It wins over the run config.

    In simulation Flower sets `partition_id` and `num_partitions` alone. A deployed participant
    sets `client_id` and whatever else it wants to decide itself. `head_tag` names those with whom
    it wants to share heads where `head-sharing = "tag"`; the server sees a hash of it.
    """

    client_id: str = ""
    partition_id: int = Field(-1, ge=-1)
    num_partitions: int = Field(0, ge=0)
    model: str = ""
    head_tag: str = ""
    dataset: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    partition: str | None = None
    classes_per_client: int | None = Field(None, ge=0)
    dirichlet_alpha: float | None = Field(None, ge=0)
    max_client_examples: int | None = Field(None, ge=0)
    partition_options: str | None = None
    test_fraction: float | None = Field(None, gt=0, lt=1)
    image_size: int | None = Field(None, ge=8)
    device: str | None = None
    client_threads: int | None = Field(None, ge=0)
    state_dir: str | None = None
    warm_worker: Literal["auto", "on", "off"] = "auto"

    @classmethod
    def parse(cls, flat: Mapping[str, Any]) -> Self:
        """Build the node config; raise ConfigError on an unknown key or a bad value."""
        known = cls.key_names()
        for key in flat:
            if key not in known:
                raise ConfigError("node config: " + unknown_name("key", key, known))
        return _validated(cls, dict(flat), "node config")

    @model_validator(mode="after")
    def _has_identity(self) -> Self:
        if not self.client_id and self.partition_id < 0:
            raise ValueError("set client-id (a stable name of this participant) or partition-id")
        return self

    @property
    def identity(self) -> str:
        """The stable client_id: declared, or the partition id where none is (simulation)."""
        return self.client_id or str(self.partition_id)

    def client_section(self, run: RunConfig) -> ClientSection:
        """Merge with the run config: what the participant declared wins."""
        own = self.model_dump(by_alias=True, exclude_none=True)
        merged = {**run.client.flat(), **_pick(own, ClientSection)}
        merged["num-partitions"] = self.num_partitions or run.client.num_partitions
        if self.model:
            merged["models"] = self.model
        return _validated(ClientSection, merged, "node config")


S = TypeVar("S", bound=Section)


def _pick(flat: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    names = section.key_names()
    return {key: value for key, value in flat.items() if key in names}


def _validated(section: type[S], values: dict[str, Any], where: str) -> S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = kebab(str(first["loc"][0])) if first["loc"] else "value"
        raise ConfigError(
            f"{where}: {key} = {first.get('input')!r} cannot be used: {first['msg']}."
        ) from error
