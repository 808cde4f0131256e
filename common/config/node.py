"""What one participant declares of itself, and what it takes of a server's run config."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import create_model, model_validator

from common.config.client import Augmentation, ClassNames, ClientSection, Intensity, Noise
from common.config.section import Scalar, Section, key
from common.config.training import TrainingSection
from common.errors import ConfigError

ASKED = frozenset(
    {
        *("method", "rounds", "seed", "checkpoint-every", "server-rule", "head-sharing", "gd-mode"),
        *("local-epochs", "batch-size", "optimizer", "learning-rate", "learning-rate-final"),
        *("momentum", "weight-decay", "label-smoothing", "client-clip-norm", "training-precision"),
        "local-patience",
        *("models", "dataset", "global-model", "distill-alpha", "distill-temperature"),
        *("fedprox-mu", "prototype-weight", "pfedhn-batches"),
        *("image-size", "channels", "augmentation", "measure-alone", "class-names"),
        *("dp-noise", "wire-precision", "uplink-top-k"),
    }
)
"""All that a run config may say to a participant with a client-id: nothing of its machine, nor of
which of its examples it uses, trains on and holds back. A server that could cut them to one would
see that one's gradient, and one that knew a split could train on what another holds back."""
DIVIDED = frozenset(
    {
        *("partition", "num-partitions", "classes-per-client", "dirichlet-alpha"),
        *("min-client-examples", "partition-options"),
    }
)
"""And how a data set is divided, to one whose own file says which part of it is its own."""
VALIDATED = frozenset({"dataset", "image-size", "channels", "class-names"})
"""What of ASKED decides on which examples models are validated; all of DIVIDED does."""
MOST_NAMES = 1000
MOST_ASKED = {"image-size": 256}
"""Beyond these a participant's own file has to name the value."""
MOST_PIXELS = 1 << 22
"""Of a batch that a server may ask for; a ResNet-18 keeps 2.7 KB for each, 11 GB together."""
CODE = {
    "models": "model", "dataset": "dataset", "global-model": "global-model",
    "augmentation": "augmentation",
}  # fmt: skip
"""Keys of a run config that may name code, and those of the node config that win."""
AS_RUN = "wins over the run config's"


if TYPE_CHECKING:
    OwnRecipe = Section
else:
    OwnRecipe = create_model(
        "OwnRecipe",
        __base__=Section,
        **{
            name: (Annotated[(field.annotation, *field.metadata, AS_RUN)] | None, key(None, AS_RUN))
            for name, field in TrainingSection.model_fields.items()
        },
    )
    """Every key of local training, which a participant may set for itself."""


class NodeConfig(OwnRecipe):
    """What one participant declares (`--node-config`). It wins over the run config.

    In simulation Flower sets `partition_id` and `num_partitions` alone. A deployed participant
    sets `client_id` and whatever else it wants to decide itself.
    """

    client_id: str = key("", "a stable name of this participant, which owns its embedding")
    partition_id: int = key(-1, "its part of the data, where there is a partition", ge=-1)
    num_partitions: int = key(0, "parts of the data; 0: as the run config says", ge=0)
    model: str = key("", 'a name or "module:factory"; empty: from the run config\'s models')
    generate: str = key(
        "",
        "which parameters are shared, by patterns of their names, such as head.*, *.adapter.*; "
        "all others stay at home, as they are built; empty: all that require a gradient",
    )
    head_tag: str = key(
        "",
        "names those it wants to share heads with; the server sees a hash of it",
        where='head-sharing "tag"',
    )
    global_model: str = key(
        "", 'the "module:factory" of the common model, where the run config names the same'
    )
    dataset: str | None = key(None, AS_RUN)
    data_dir: str | None = key(None, AS_RUN)
    cache_dir: str | None = key(None, AS_RUN)
    partition: str | None = key(None, AS_RUN)
    classes_per_client: int | None = key(None, AS_RUN, ge=0)
    dirichlet_alpha: float | None = key(None, AS_RUN, ge=0)
    max_client_examples: int | None = key(None, AS_RUN, ge=0)
    partition_options: str | None = key(None, AS_RUN)
    test_fraction: float | None = key(None, AS_RUN, gt=0, lt=1)
    validation_fraction: float | None = key(None, AS_RUN, ge=0, lt=1)
    split_seed: int = key(
        -1, "which of its examples are held back; -1: drawn once, and kept in the state-dir", ge=-1
    )
    class_names: ClassNames | None = key(None, AS_RUN)
    measure_alone: bool | None = key(None, AS_RUN)
    image_size: int | None = key(None, AS_RUN, unit="pixels a side", ge=8, le=2048)
    channels: Literal[0, 1, 3] | None = key(None, AS_RUN)
    intensity: Intensity | None = key(None, AS_RUN)
    augmentation: Augmentation | None = key(None, AS_RUN)
    loss: str | None = key(None, AS_RUN)
    dp_noise: Noise | None = key(
        None, "counts where it is larger than the run config's", ge=0, le=1e4
    )
    dp_clip: float | None = key(None, AS_RUN, unit="norm", ge=1e-3, le=1e3)
    device: str | None = key(None, AS_RUN)
    client_threads: int | None = key(None, AS_RUN, ge=0)
    state_dir: str | None = key(None, AS_RUN)
    warm_worker: Literal["auto", "on", "off"] = key(
        "auto", "keep torch loaded between messages: auto (with a state-dir), on, off"
    )
    max_local_epochs: int = key(
        50, "the most local-epochs that a server may ask of a participant with a client-id", ge=1
    )
    max_batch_size: int = key(
        1024, "the most batch-size that a server may ask of a participant with a client-id", ge=1
    )

    max_epsilon: float = key(
        0.0,
        "training that would spend more privacy is refused; 0: no limit",
        where="dp-noise",
        ge=0,
    )

    @classmethod
    def parse(cls, flat: Mapping[str, Any]) -> Self:
        """Build the node config; raise ConfigError on an unknown key or a bad value."""
        return cls.checked(flat, "node config")

    @model_validator(mode="after")
    def _has_identity(self) -> Self:
        if not self.client_id and self.partition_id < 0:
            raise ValueError("set client-id (a stable name of this participant) or partition-id")
        return self

    @property
    def identity(self) -> str:
        """The stable client_id: declared, or the partition id where none is (simulation)."""
        return self.client_id or str(self.partition_id)

    def admitted(self, asked: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return what a deployed participant takes of a server's run config, by key.

        A closed list, with bounds; and where the server names code, only what the participant named
        itself. Raises ConfigError where the server asks for more, or names other code. A simulated
        client, without a client-id, takes everything.
        """
        if not self.client_id:
            return dict(asked)
        for name, value in asked.items():
            if isinstance(value, str) and not value.isprintable():
                raise ConfigError(
                    f"client {self.client_id}: the server's run config has line breaks or control "
                    f"characters in {name!r:.80}. Whoever starts the run writes it on one line."
                )
        own = self.model_dump(by_alias=True)
        for name, mine in CODE.items():
            named = str(asked.get(name, ""))
            differs = bool(own[mine]) and name == "global-model" and own[mine] != named
            if differs or (":" in named and not own[mine]):
                raise ConfigError(
                    f"client {self.client_id}: the server's run config names code as its {name}, "
                    f"and this participant's own file does not. Only code that a participant has "
                    f"named itself is run: set {mine} there if you trust it."
                )
        if self.class_names is None and str(asked.get("class-names", "")).count(",") >= MOST_NAMES:
            raise ConfigError(
                f"client {self.client_id}: the server's run config names more than {MOST_NAMES} "
                "classes; beyond that this participant's own file has to set class-names."
            )
        for name, most in MOST_ASKED.items():
            value = asked.get(name, 0)
            if own[name] is None and (isinstance(value, str) or value > most):
                raise ConfigError(
                    f"client {self.client_id}: the server's run config asks for {name} = "
                    f"{asked[name]!r:.80}; beyond {most} this participant's own file has to set it."
                )
        taken = ASKED | DIVIDED if self.partition_id >= 0 or self.partition else ASKED
        whole = {} if taken > ASKED else {"partition": "none"}
        return whole | {name: value for name, value in asked.items() if name in taken}

    def followed(self, asked: Mapping[str, Scalar], *, whole: bool) -> dict[str, Scalar]:
        """Return what a run config alone says of the examples that models are validated on.

        `whole` is whether they are all of the data set, however that would be divided.
        """
        own, deciding = self.model_dump(by_alias=True), VALIDATED
        deciding |= frozenset() if whole else DIVIDED | {"seed"}
        return {k: asked[k] for k in sorted(deciding) if own.get(k) is None and k in asked}

    def require_modest(self, asked: Mapping[str, int]) -> None:
        """Raise ConfigError where a run config asks for more than this participant's caps.

        `asked` has the run config's keys. A simulated client, without a client-id, has no caps.
        """
        if not self.client_id:
            return
        caps = {"local-epochs": self.max_local_epochs, "batch-size": self.max_batch_size}
        for name, value in asked.items():
            if value > caps[name]:
                raise ConfigError(
                    f"client {self.client_id}: the server's run config asks for {name} = {value}; "
                    f"this participant's own file, or its contract, allows max-{name} = "
                    f"{caps[name]}. Whoever starts the run lowers {name}, or the participant "
                    f"raises max-{name}."
                )

    def with_room(self, image_size: int) -> Self:
        """Return this with a batch-size that pictures of that size allow, unless its file says one.

        Pixels count together: each alone is within its bound, and a network keeps both for a step.
        """
        most = max(1, MOST_PIXELS // image_size**2)
        if "max_batch_size" in self.model_fields_set or most >= self.max_batch_size:
            return self
        return self.model_copy(update={"max_batch_size": most})

    @cached_property
    def recipe(self) -> dict[str, Scalar]:
        """What this participant has declared of its local training, by key."""
        return TrainingSection.pick(self.model_dump(by_alias=True, exclude_none=True))

    def training(self, asked: TrainingSection) -> TrainingSection:
        """Return how this participant trains where a server proposes: its own recipe wins.

        Raises ConfigError where what is asked is beyond this participant's caps.
        """
        sizes = {"local-epochs": asked.local_epochs, "batch-size": asked.batch_size}
        self.require_modest({k: size for k, size in sizes.items() if k not in self.recipe})
        return asked.model_copy(
            update={name.replace("-", "_"): x for name, x in self.recipe.items()}
        )

    def client_section(self, run: ClientSection) -> ClientSection:
        """Merge with the run config's section: what the participant declared wins."""
        own = self.model_dump(by_alias=True, exclude_none=True)
        merged = {**run.flat(), **ClientSection.pick(own)}
        merged["num-partitions"] = self.num_partitions or run.num_partitions
        merged["dp-noise"] = max(run.dp_noise, self.dp_noise or 0.0)
        if self.model:
            merged["models"] = self.model
        section = ClientSection.checked(merged, "node config")
        section.require_test_part("node config")
        if self.max_epsilon and not section.dp_noise:
            raise ConfigError(
                f"node config: max-epsilon = {self.max_epsilon:g}, and neither this file nor the "
                "run has dp-noise: what is sent without noise has no bound. Set dp-noise."
            )
        if section.dp_noise and section.loss:
            raise ConfigError(
                f"node config: loss = {section.loss!r} may be made of all examples, and dp-noise "
                "protects single ones. Leave out one of the two."
            )
        if section.dp_noise and self.client_id and not section.state_dir:
            raise ConfigError(
                f"node config: dp-noise = {section.dp_noise:g} needs a state-dir, where it is kept "
                f"what was spent of the privacy of {self.client_id}'s examples: a restart would "
                "forget it. Set state-dir."
            )
        return section
