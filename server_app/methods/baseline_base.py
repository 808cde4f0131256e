"""The server half of a baseline: five short hooks (docs/baselines.md, "Adding one").

A baseline says what goes down to a client, checks what comes up, and folds a round's uploads into
its state. Rounds, registration, rejects, evaluation, outputs and checkpoints are everybody's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor

from common.compression import Float32
from common.config import RunConfig
from common.errors import RegistrationError, WireError
from common.parcels import Arrays, Parcel
from common.wire import Registration
from server_app.clients import Client

T = TypeVar("T")

CheckNorm = Callable[[Float32, str, str], None]
"""(vector, its name, source): raise WireError when its norm is beyond `max-delta-norm`."""

SHARED_SIZES = ("num_classes", "feature_dim", "num_global_parameters")
"""What all clients have to agree on where a baseline needs it."""


@dataclass(frozen=True)
class Upload(Generic[T]):
    """A good reply: what `Baseline.read` made of it, and the client it came from."""

    client: Client
    num_examples: int
    content: T


class Baseline(ABC, Generic[T]):
    """One baseline on the server.

    Attributes
    ----------
    needs : fields of `Registration` that a client must fill in.
    others : further predictors whose accuracy clients report.
    synchronous : one fold a round, of everybody's uploads; else the run's schedule decides.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    others: ClassVar[tuple[str, ...]] = ()
    synchronous: ClassVar[bool] = True

    def __init__(self, config: RunConfig, check_norm: CheckNorm) -> None:
        self.config = config
        self.check_norm = check_norm

    # --- the hooks -------------------------------------------------------------------------------

    @abstractmethod
    def download(self, client: Client) -> Arrays:
        """Return what goes to this client, for training, evaluation and finish; may be empty."""

    @abstractmethod
    def read(self, client: Client, parcel: Parcel) -> T:
        """Read and check what this client sent.

        Raises
        ------
        WireError
            It is not what this baseline expects; the reply is then rejected.
        """

    @abstractmethod
    def fold(self, uploads: Sequence[Upload[T]], server_round: int) -> None:
        """Learn from good uploads, at least one, in order of client_id."""

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export what was learned: tensors, and JSON-able facts."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load an exported state; raise CheckpointError where it does not fit."""

    # --- around them -----------------------------------------------------------------------------

    @classmethod
    def validate(cls, config: RunConfig) -> None:
        """Raise ConfigError when this baseline cannot run with a config."""

    def open_round(self, clients: Sequence[Client]) -> None:
        """Note who takes part in the round that begins."""

    def require(self, registration: Registration, source: str) -> None:
        """Raise WireError when a registration lacks something, or declares absurd sizes."""
        for name in sorted(self.needs):
            if not getattr(registration, name):
                raise WireError(
                    f"{source}: {name} is missing, which {self.config.run.method} needs. Start "
                    "the client with the run config of this federation."
                )
        cap = self.config.hypernet.max_parameters
        for what, size in self.sizes(registration).items():
            if size > cap:
                raise WireError(
                    f"{source}: {what} of {size:,} numbers; at most {cap:,} (max-parameters)."
                )

    def sizes(self, registration: Registration) -> dict[str, int]:
        """Return what the server may have to hold for such a client beside its model, by name."""
        head = registration.num_classes * (registration.feature_dim + 1)
        return {"a head": head, "a shared model": registration.num_global_parameters}

    def check(self, registration: Registration, known: Collection[Client]) -> None:
        """Check a registration against everybody else's.

        Raises
        ------
        RegistrationError
            It cannot take part together with the others.
        """
        for name in SHARED_SIZES:
            mine = getattr(registration, name)
            agreed = next((getattr(client, name) for client in known), mine)
            if name in self.needs and mine != agreed:
                raise RegistrationError(
                    f"client {registration.client_id} has {name} = {mine}; the federation's is "
                    f"{agreed}. {self.config.run.method} shares vectors of that size: all clients "
                    "need the same number of classes and models whose last layers are alike."
                )


def mean_vector(vectors: Sequence[Float32], weights: Sequence[float]) -> Float32:
    """Return sum(w x) / sum(w) (P,) of vectors (P,), summed in float64 in the order given."""
    total = np.zeros(vectors[0].shape)
    for x, weight in zip(vectors, weights, strict=True):
        total += weight * x.astype(np.float64)
    return (total / sum(weights)).astype(np.float32)
