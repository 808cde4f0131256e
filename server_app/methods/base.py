"""The server half of a method: what is sent, what is accepted, what is learned, what is saved.

Rounds, registration, refused replies, evaluation, outputs and checkpoints are the same for all.
docs/baselines.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from common.compression import Float32
from common.config import RunConfig
from common.errors import ConfigError, RegistrationError
from common.log import logger
from common.messages import MOST_WEIGHT, Registration, bounded_counts
from common.methods import METHODS
from common.records import Arrays, Content, Received
from server_app.aggregation.base import StepDiagnostics
from server_app.clients import Client

T = TypeVar("T")
R = TypeVar("R")

SYNCHRONOUS = {"max-in-flight": 0, "buffer-size": 0, "max-staleness": 0}
SHARED_SIZES = ("num_classes", "feature_dim", "num_global_parameters")
"""What all clients have to agree on where a method needs it."""


@dataclass(frozen=True)
class Upload(Generic[T]):
    """A good reply: what `Method.read` made of it, and how many server steps old it is."""

    client: Client
    num_examples: int
    content: T
    staleness: int = 0


class Exchange(Protocol):
    """Sends everybody in `contents` a training message before the training; reads the replies."""

    def __call__(
        self,
        contents: Iterable[tuple[Client, Content]],
        read: Callable[[Client, Received], R],
    ) -> list[Upload[R]]:
        """Return the good replies."""


class Method(Generic[T]):
    """One method on the server; what is not replaced is Local: nothing travels.

    Attributes
    ----------
    others : further predictors whose accuracy clients report.
    num_steps : server steps taken so far.
    max_norm : of a change that is accepted; see `common.records.require_norm`.
    training_keys : of the run config, in every message to train.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.others = METHODS[config.run.method].others
        self.num_steps = 0
        self.max_norm = config.schedule.max_delta_norm
        self.training_keys = config.training.flat()

    # --- what is sent ----------------------------------------------------------------------------

    def open_round(self, server_round: int, clients: Sequence[Client], exchange: Exchange) -> None:
        """Note who is about to train, in order of client_id; exchange messages of one's own."""

    def contents(self, clients: Sequence[Client], *, training: bool) -> Iterator[Content]:
        """Make what goes to each client, when it is asked for: to train, or to test and keep."""
        for client in clients:
            yield Content(arrays=self.download(client))

    def download(self, client: Client) -> Arrays:
        """Return the vectors that go to this client, for training, evaluation and finish."""
        return {}

    # --- what is accepted ------------------------------------------------------------------------

    def read(self, client: Client, reply: Received) -> T | None:
        """Read and check what this client sent; any exception refuses the reply."""
        return None

    # --- what is learned -------------------------------------------------------------------------

    def learn(
        self, uploads: Sequence[Upload[T]], *, server_round: int, progress: float
    ) -> StepDiagnostics | None:
        """Take one server step on good uploads, at least one, in order of client_id.

        `progress` counts the rounds done so far, the share of this one that has answered included.
        """
        return None

    def close_round(self) -> dict[str, float]:
        """Learn what is left over when everybody has answered; return columns of metrics.jsonl."""
        return {}

    # --- what is saved ---------------------------------------------------------------------------

    def keep_releases(self, folder: Path, *earlier: Path) -> None:
        """Keep count in the run's folder of what is released, where privacy is counted at all."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what was learned: tensors, and JSON-able facts."""
        return {}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; raise CheckpointError where it does not fit."""

    def facts(self, client: Client) -> dict[str, object]:
        """Return columns of clients.csv that only this method knows."""
        return {"group": client.group} if "group" in self.config.needs else {}

    # --- who takes part --------------------------------------------------------------------------

    @classmethod
    def adapted(cls, config: RunConfig) -> RunConfig:
        """Return the config as the method runs it: most take one step a round, of all replies.

        Raises ConfigError where the method cannot run with this config.
        """
        name, info = config.run.method, METHODS[config.run.method]
        if info.is_baseline and config.run.novel_only:
            raise ConfigError(
                f"novel-only freezes a hypernetwork, and {name} has none that new clients could "
                "learn against. Set novel-only = false."
            )
        if not info.synchronous:
            return config
        if config.schedule.max_in_flight or config.schedule.buffer_size:
            logger.info("%s is synchronous: max-in-flight and buffer-size become 0 (all)", name)
        return config.with_overrides(SYNCHRONOUS)

    def admit(self, registration: Registration, other: Client | None) -> None:
        """Check a registration by itself and against another client's, if there is one.

        Raises RegistrationError where it lacks something, declares absurd sizes, or cannot take
        part with the others.
        """
        name, needs = self.config.run.method, self.config.needs
        who = f"client {registration.client_id}"
        for need in needs:
            if not getattr(registration, need):
                raise RegistrationError(
                    f"{who}: {need} is missing, which {name} needs. Start the client with the run "
                    "config of this federation."
                )
        for name_of in (*SHARED_SIZES, "group"):
            if getattr(registration, name_of) and name_of not in needs:
                raise RegistrationError(
                    f"{who} declares {name_of}, for which {name} has no use. Start the client with "
                    "the run config of this federation."
                )
        cap = self.config.hypernet.max_parameters
        for what, size in self.sizes(registration).items():
            if size > cap:
                raise RegistrationError(
                    f"{who}: {what} of {size:,} numbers; at most {cap:,} (max-parameters)."
                )
        for shared in (name for name in SHARED_SIZES if name in needs):
            mine = getattr(registration, shared)
            agreed = getattr(other, shared) if other else mine
            if shared == "num_global_parameters":
                agreed = self.config.hypernet.global_parameters or agreed
            if mine != agreed:
                raise RegistrationError(
                    f"{who} has {shared} = {mine:,}; the federation's is {agreed:,}. {name} shares "
                    "vectors of that size: all clients need the same global-model and number of "
                    "classes, and models whose last layers are alike."
                )

    def sizes(self, registration: Registration) -> dict[str, int]:
        """Return what the server may have to hold for such a client beside its model, by name."""
        classes, features = registration.num_classes, registration.feature_dim
        return {
            "a head": classes * (features + 1),
            "class means": classes * max(classes, features),
            "a shared model": registration.num_global_parameters,
        }

    def add_client(self, client: Client) -> None:
        """Take note of a client that was just admitted: new, back, or with another model."""

    def forget_client(self, client_id: str) -> None:
        """Drop what is a client's own; what it gave to all cannot be taken out."""

    def learners(self, clients: list[Client]) -> list[Client]:
        """Return those who train; raise RunError when nobody does."""
        return clients


class Local(Method[None]):
    """Nothing travels: the bar that decides whether federation helped at all."""


def mean_vector(uploads: Sequence[Upload[Float32]]) -> Float32:
    """Return the mean of vectors (P,), weighted by examples, summed in float64 in their order.

    Differs from FedAvg: nobody's claim counts for more than three times the median.
    """
    weights = bounded_counts([upload.num_examples for upload in uploads], MOST_WEIGHT)
    total = np.zeros(uploads[0].content.shape)
    for upload, weight in zip(uploads, weights, strict=True):
        total += weight * upload.content.astype(np.float64)
    return (total / sum(weights)).astype(np.float32)
