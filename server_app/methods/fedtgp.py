"""FedTGP (Zhang et al. 2024, arXiv 2401.03230): prototypes that the server trains to be apart.

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
from common.seeding import torch_generator
from common.wire import Registration
from server_app.methods.baseline_base import CheckNorm, Upload
from server_app.methods.fedgh import batches, stacked
from server_app.methods.fedproto import FedProto, renewed
from server_app.output.checkpoint import required_tensor

SHAPES = ("points", "weight1", "bias1", "weight2", "bias2")
EPOCHS = 100
"""The server's passes over the received means in a round."""
LARGEST_MARGIN = 100.0
"""Between prototypes, in units of the features."""


class FedTGP(FedProto):
    """Prototypes P_c = W2 relu(W1 v_c + b1) + b2 of trainable points v_c (C, D)."""

    def __init__(self, config: RunConfig, check_norm: CheckNorm) -> None:
        super().__init__(config, check_norm)
        self._learned: dict[str, Tensor] = {}

    def sizes(self, registration: Registration) -> dict[str, int]:
        """Add the layers that generate prototypes."""
        return super().sizes(registration) | {"a layer": registration.feature_dim**2}

    def fold(self, uploads: Sequence[Upload[ClassMeans]], server_round: int) -> None:
        """Train the prototypes against what came; send those of classes seen so far."""
        contents = [upload.content for upload in uploads]
        pooled = pool(contents)
        learned = self._learned or draw(*pooled.means.shape, seed=self.config.run.seed)
        generator = torch_generator(self.config.run.seed, "fedtgp", server_round=server_round)
        learned = self._train(learned, contents, generator)
        prototypes_CD = generated(learned).detach().numpy()
        if not np.isfinite(prototypes_CD).all():
            logger.warning("Round %d: FedTGP diverged and was left as it was", server_round)
            return
        self._learned = learned
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

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the prototypes and what generates them."""
        tensors, meta = super().export()
        return tensors | {f"fedtgp.{name}": x for name, x in self._learned.items()}, meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load them."""
        super().restore(tensors, meta)
        if self.prototypes is None:
            return
        shapes = {name: tuple(x.shape) for name, x in draw(*meta["prototypes"], seed=0).items()}
        self._learned = {n: required_tensor(tensors, f"fedtgp.{n}", s) for n, s in shapes.items()}


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
