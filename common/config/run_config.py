"""The run config: flat kebab-case keys and scalars, as Flower has them, parsed once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict

from common.config.client import ClientSection, WireSection
from common.config.hypernet import HypernetSection, UpdateSection
from common.config.node import NodeConfig
from common.config.run import RunSection, ScheduleSection
from common.config.section import Scalar, Section, require_known
from common.config.training import BaselineSection, DistillSection, TrainingSection
from common.errors import ConfigError, listing
from common.methods import METHODS

TITLES = {
    "run": "what to run",
    "schedule": "who trains when",
    "hypernet": "hypernetwork",
    "update": "server update",
    "training": "local training",
    "distill": "MH-pFedHNGD",
    "baseline": "baselines (docs/baselines.md)",
    "client": "clients that declare nothing themselves (a node config wins over all of this)",
    "wire": "on the wire",
}
PRIVATE_METHODS = ("mh-pfedhn", "mh-pfedhn-gd", "mh-pfedhn-pg", "local")
"""Of which nothing leaves a client but what `client_app.training.private` trained, and counts."""
FAR = 500
"""Steps of Adam over one standard deviation of the embeddings that are too many for a run."""


class RunConfig(BaseModel):
    """The whole run config, one section per concern; `RunConfig()` has the defaults."""

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

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Return the sections' classes by name, in their order."""
        return {name: type(field.default) for name, field in cls.model_fields.items()}

    @property
    def distils(self) -> bool:
        """Whether clients learn from a common model: the global one, or each from its own."""
        return self.has_global_model or self.has_personal_common

    @property
    def has_global_model(self) -> bool:
        """Whether there is one w_g for everybody (MH-pFedHNGD)."""
        return self.run.method == "mh-pfedhn-gd"

    @property
    def has_personal_common(self) -> bool:
        """Whether every client has a common model of its own (MH-pFedHN-PG)."""
        return self.run.method == "mh-pfedhn-pg"

    @property
    def exchanges_first(self) -> bool:
        """Whether the global model has a message of its own before the personal one."""
        return self.has_global_model and self.distill.gd_mode == "separate"

    @cached_property
    def adds_init(self) -> bool:
        """Whether what is generated is added to what a model's own code draws.

        The kernel rule's hypernetwork starts at zero; the published one draws whole models.
        """
        return self.update.server_rule == "kernel"

    @property
    def is_baseline(self) -> bool:
        """Whether the method is not this project's own."""
        return METHODS[self.run.method].is_baseline

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a registration that every client must fill in, beside its sizes."""
        by_tag = self.hypernet.head_sharing == "tag" and not self.is_baseline
        return METHODS[self.run.method].needs + (("group",) if by_tag else ())

    @classmethod
    @cache
    def key_names(cls) -> frozenset[str]:
        """Return every key of the run config."""
        return frozenset().union(*(s.key_names() for s in cls.sections().values()))

    @classmethod
    def parse(cls, flat: Mapping[str, Any]) -> Self:
        """Build the config from flat kebab-case keys; keys left out keep their default.

        Raises ConfigError where a key is unknown (the nearest one is named), a value is out of
        range, or values do not go together.
        """
        where = "run config"
        require_known(flat, cls.key_names(), where)
        parts = {name: s.checked(s.pick(flat), where) for name, s in cls.sections().items()}
        config = cls.model_validate(parts)
        _check_together(config)
        return config

    def flat(self) -> dict[str, Scalar]:
        """Return all keys and values, as Flower's run config wants them."""
        merged: dict[str, Scalar] = {}
        for name in self.sections():
            merged |= getattr(self, name).flat()
        return merged

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """Return a copy with some keys replaced, validated like the whole."""
        return self.parse({**self.flat(), **overrides})


class Declared(NamedTuple):
    """What one client goes by: both configs, and their client sections merged."""

    run: RunConfig
    node: NodeConfig
    client: ClientSection
    client_id: str


@lru_cache(maxsize=1024)
def declared(run: tuple[tuple[str, Scalar], ...], node: tuple[tuple[str, Scalar], ...]) -> Declared:
    """Parse the items of a run config and a node config, once in a process; raise ConfigError."""
    own = NodeConfig.parse(dict(node))
    config = RunConfig.parse(own.admitted(dict(run)))
    section = own.client_section(config.client)
    own = own.with_room(section.image_size)
    training = own.training(config.training)
    _require_private(config.run.method, training, section.dp_noise, "node config")
    return Declared(config, own, section, own.identity)


def _check_together(config: RunConfig) -> None:
    """Raise ConfigError when keys of different sections do not go together."""
    if config.wire.uplink_top_k < 1 and config.is_baseline:
        raise ConfigError(
            f"run config: uplink-top-k = {config.wire.uplink_top_k} shortens the deltas of "
            f"mh-pfedhn and mh-pfedhn-gd; method = {config.run.method!r} sends its arrays whole. "
            "Set uplink-top-k = 1."
        )
    config.client.require_test_part("run config")
    if config.client.tested_on == "validation" and not config.client.validation_fraction:
        raise ConfigError(
            "run config: tested-on = 'validation' with validation-fraction = 0: there are no such "
            "examples. Set validation-fraction = 0.1, say."
        )
    if config.run.patience and not config.client.validation_fraction:
        raise ConfigError(
            f"run config: patience = {config.run.patience} with validation-fraction = 0: there are "
            "no examples to judge by. Set validation-fraction = 0.1, say."
        )
    if config.has_personal_common and not config.client.validation_fraction:
        raise ConfigError(
            "run config: mh-pfedhn-pg weighs the own and the common model on validation examples; "
            "validation-fraction = 0 leaves none. Set 0.1, say."
        )
    if config.client.absent_clients >= config.client.num_partitions:
        raise ConfigError(
            f"run config: absent-clients = {config.client.absent_clients} of "
            f"{config.client.num_partitions} clients leaves nobody. Make it smaller."
        )
    _require_private(config.run.method, config.training, config.client.dp_noise, "run config")
    _check_patience(config)
    _check_rates(config)
    _check_user_privacy(config)


def _require_private(method: str, training: TrainingSection, noise: float, where: str) -> None:
    if noise and training.local_patience:
        raise ConfigError(
            f"{where}: local-patience = {training.local_patience} with dp-noise = {noise:g}: the "
            "validation examples would choose what is sent, and no noise covers that. Set "
            "local-patience = 0."
        )
    if noise and method not in PRIVATE_METHODS:
        raise ConfigError(
            f"{where}: dp-noise = {noise:g}, but {method} sends more than what private training "
            f"makes: nothing would bound it. Set method to one of {listing(PRIVATE_METHODS)}, or "
            "dp-noise = 0."
        )


def _check_user_privacy(config: RunConfig) -> None:
    noise, method, rule = config.update.user_dp_noise, config.run.method, config.update.server_rule
    if noise and (rule != "kernel" or method not in ("mh-pfedhn", "mh-pfedhn-pg")):
        raise ConfigError(
            f"run config: user-dp-noise = {noise:g} covers mh-pfedhn and mh-pfedhn-pg with the "
            f"kernel rule; this is method = {method!r} with server-rule = {rule!r}. Change these, "
            "or set user-dp-noise = 0."
        )


def _check_patience(config: RunConfig) -> None:
    s = config.schedule
    if s.clients_per_round > 1 and s.clients_per_round % 1:
        raise ConfigError(
            f"run config: clients-per-round = {s.clients_per_round:g} is neither a number of "
            "clients nor a fraction of them. Give a whole number, or one below 1."
        )
    if s.close_fraction < s.min_fraction:
        raise ConfigError(
            f"run config: close-fraction = {s.close_fraction:g} ends a round before min-fraction = "
            f"{s.min_fraction:g} of its clients have answered, and such a round stops the run. Set "
            "close-fraction to min-fraction or more."
        )
    waits = [f"evaluation = {config.run.evaluation!r}"] * (config.run.evaluation == "separate")
    if config.exchanges_first:
        waits.append("gd-mode = 'separate'")
    if s.close_fraction < 1 and waits:
        raise ConfigError(
            f"run config: close-fraction = {s.close_fraction:g} lets a round go on without its "
            f"slowest clients, but {' and '.join(waits)} takes messages of its own, which wait for "
            "everybody who is free. Set " + ("both " if len(waits) > 1 else "it ") + "to 'fused'."
        )


def _check_rates(config: RunConfig) -> None:
    u = config.update
    if u.server_rule == "adam" and not u.server_lr:
        raise ConfigError(
            "run config: server-lr = 0 with server-rule = 'adam': no head would ever learn. "
            "Set a rate; 0 is for server-rule = 'kernel', which needs none."
        )
    if (
        config.run.novel_only
        and u.server_rule == "adam"
        and not config.is_baseline
        and u.embedding_lr * FAR < config.hypernet.embedding_std
    ):
        raise ConfigError(
            f"run config: novel-only with embedding-lr = {u.embedding_lr:g}: embeddings are all "
            f"that learns there, and such steps get nowhere between embeddings that lie "
            f"{config.hypernet.embedding_std:g} (embedding-std) apart. Set embedding-lr = 0.03 "
            "and lr-decay-from = 1, say."
        )
