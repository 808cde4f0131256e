"""FedProto (Tan et al. 2022, arXiv 2105.00243), FD and FedTGP: only means by class travel.

Shapes: C classes, D feature, N received class means.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.class_means import ClassMeans, pool
from common.config import RunConfig
from common.log import logger
from common.messages import MEANS, Registration
from common.records import COUNTS, Arrays, Received
from common.seeding import torch_generator
from common.serialization import required_tensor
from server_app.clients import Client
from server_app.methods.base import Method, Upload
from server_app.methods.heads import batches, stacked

SHAPES = ("points", "weight1", "bias1", "weight2", "bias2")
EPOCHS = 100
"""FedTGP: the server's passes over the received means in a round."""
LARGEST_MARGIN = 100.0
"""FedTGP: between prototypes, in units of the features."""


class FedProto(Method[ClassMeans]):
    """Averages clients' class means, weighted by their counts.

    Attributes
    ----------
    prototypes : of every class that anybody ever sent; None before.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.prototypes: ClassMeans | None = None

    def dim(self, client: Client) -> int:
        """Return the size of one class's vector."""
        return client.feature_dim

    def download(self, client: Client) -> Arrays:
        """Return the prototypes, once there are any; not who has how many examples."""
        return {} if self.prototypes is None else self.prototypes.presence().arrays()

    def read(self, client: Client, reply: Received) -> ClassMeans:
        """Read the client's class means; their norm is limited as a delta's is."""
        sizes, most = (client.num_classes, self.dim(client)), client.num_examples
        return ClassMeans.read(reply, *sizes, most=most, max_norm=self.max_norm)

    def learn(
        self, uploads: Sequence[Upload[ClassMeans]], *, server_round: int, progress: float
    ) -> None:
        """Renew the prototypes of the classes that came; the others stay as they were."""
        self.prototypes = renewed(self.prototypes, pool([u.content for u in uploads]))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the prototypes."""
        if self.prototypes is None:
            return {}, {"prototypes": None}
        tensors = {
            f"prototypes.{COUNTS}": torch.from_numpy(self.prototypes.counts),
            f"prototypes.{MEANS}": torch.from_numpy(self.prototypes.means),
        }
        return tensors, {"prototypes": list(self.prototypes.means.shape)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load the prototypes."""
        if facts["prototypes"] is None:
            return
        rows, dim = facts["prototypes"]
        self.prototypes = ClassMeans(
            required_tensor(tensors, f"prototypes.{COUNTS}", (rows,)).numpy().copy(),
            required_tensor(tensors, f"prototypes.{MEANS}", (rows, dim)).numpy().copy(),
        )


class FD(FedProto):
    """Federated distillation (Jeong et al. 2018, arXiv 1811.11479): class-mean logits (C,) travel.

    Differs from paper: every client gets the mean over all clients, its own logits included.
    """

    def dim(self, client: Client) -> int:
        """Return the number of classes: one logit for each."""
        return client.num_classes


class FedTGP(FedProto):
    """Prototypes that the server trains to be apart (Zhang et al. 2024, arXiv 2401.03230).

    P_c = W2 relu(W1 v_c + b1) + b2 of trainable points v_c (C, D).
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.learned: dict[str, Tensor] = {}

    def sizes(self, registration: Registration) -> dict[str, int]:
        """Add the layers that generate prototypes."""
        return super().sizes(registration) | {"a layer": registration.feature_dim**2}

    def learn(
        self, uploads: Sequence[Upload[ClassMeans]], *, server_round: int, progress: float
    ) -> None:
        """Train the prototypes against what came; send those of classes seen so far."""
        contents = [upload.content for upload in uploads]
        pooled = pool(contents)
        learned = self.learned or draw(*pooled.means.shape, seed=self.config.run.seed)
        generator = torch_generator(self.config.run.seed, "fedtgp", server_round=server_round)
        learned = self._train(learned, contents, generator)
        prototypes_CD = generated(learned).detach().numpy()
        if not np.isfinite(prototypes_CD).all():
            logger.warning("Round %d: FedTGP diverged and was left as it was", server_round)
            return
        self.learned = learned
        seen = renewed(self.prototypes, pooled).counts
        self.prototypes = ClassMeans(seen, np.where(seen[:, None] > 0, prototypes_CD, 0))

    def _train(
        self,
        learned: Mapping[str, Tensor],
        contents: Sequence[ClassMeans],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Take EPOCHS passes of plain SGD over the received means."""
        section, size = self.config.baseline, self.config.training.batch_size
        margin = adaptive_margin(pool(contents), LARGEST_MARGIN)
        features_ND, labels_N = stacked(contents)
        values = {name: x.clone().requires_grad_() for name, x in learned.items()}
        optimizer = torch.optim.SGD(values.values(), lr=section.baseline_server_lr)
        for _ in range(EPOCHS):
            for rows in batches(len(labels_N), size, generator):
                loss = contrast(features_ND[rows], labels_N[rows], generated(values), margin)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {name: x.detach() for name, x in values.items()}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the prototypes and what generates them."""
        tensors, facts = super().state_dict()
        return tensors | {f"fedtgp.{name}": x for name, x in self.learned.items()}, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load them."""
        super().load_state_dict(tensors, facts)
        if self.prototypes is None:
            return
        shapes = {name: tuple(x.shape) for name, x in draw(*facts["prototypes"], seed=0).items()}
        self.learned = {n: required_tensor(tensors, f"fedtgp.{n}", s) for n, s in shapes.items()}


def renewed(before: ClassMeans | None, now: ClassMeans) -> ClassMeans:
    """Take the new means where a class came, and the earlier ones where it did not."""
    if before is None:
        return now
    fresh = now.counts > 0
    return ClassMeans(
        np.where(fresh, now.counts, before.counts),
        np.where(fresh[:, None], now.means, before.means),
    )


def draw(num_classes: int, dim: int, *, seed: int) -> dict[str, Tensor]:
    """Draw the points from N(0, 1) and the two layers as torch initialises a Linear."""
    generator = torch_generator(seed, "fedtgp-initial")
    bound = dim**-0.5
    drawn = {"points": torch.randn(num_classes, dim, generator=generator)}
    for name in SHAPES[1:]:
        shape = (dim, dim) if name.startswith("weight") else (dim,)
        drawn[name] = nn.init.uniform_(torch.empty(shape), -bound, bound, generator=generator)
    return drawn


def generated(learned: Mapping[str, Tensor]) -> Tensor:
    """Return the prototypes (C, D)."""
    hidden = functional.linear(learned["points"], learned["weight1"], learned["bias1"])
    return functional.linear(hidden.relu(), learned["weight2"], learned["bias2"])


def adaptive_margin(pooled: ClassMeans, threshold: float) -> float:
    """Return the largest distance between two classes' mean features, at most `threshold`."""
    centres = torch.from_numpy(pooled.means[pooled.counts > 0])
    return min(float(torch.cdist(centres, centres).max()), threshold)


def contrast(features_ND: Tensor, labels_N: Tensor, prototypes_CD: Tensor, margin: float) -> Tensor:
    """Return the cross-entropy of softmax(-distance), the true class's distance plus the margin."""
    distances_NC = torch.cdist(features_ND, prototypes_CD)
    true_NC = functional.one_hot(labels_N, len(prototypes_CD))
    return functional.cross_entropy(-(distances_NC + margin * true_NC), labels_N)
