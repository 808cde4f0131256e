"""LG-FedAvg (Liang et al. 2020, arXiv 2001.01523) and FedGH (Yi et al. 2023, arXiv 2303.13137).

Own features, shared head: a linear layer from features (D,) to logits (C,); as a vector its weight
(C, D), row-major, then its bias (C,). The server knows C and D, and no more of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.class_means import ClassMeans
from common.compression import Float32
from common.config import RunConfig
from common.log import logger
from common.messages import HEAD
from common.records import Arrays, Received, require_norm
from common.seeding import torch_generator
from common.serialization import required_tensor
from server_app.clients import Client
from server_app.methods.base import Method, T, Upload, mean_vector

EPOCHS = 1
"""FedGH: the server's passes over the received means in a round."""


class SharedHead(Method[T]):
    """Sends everybody the same head.

    Attributes
    ----------
    head : (C D + C,), None until the first client is known.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.head: Float32 | None = None

    def download(self, client: Client) -> Arrays:
        """Return the head, drawn from the run's seed at first."""
        return {HEAD: self.current(client)}

    def current(self, client: Client) -> Float32:
        """Return the head; draw it when there is none yet."""
        if self.head is None:
            generator = torch_generator(self.config.run.seed, "shared-head")
            self.head = draw_head(client.num_classes, client.feature_dim, generator)
        return self.head

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the head."""
        if self.head is None:
            return {}, {"head": 0}
        return {HEAD: torch.from_numpy(self.head)}, {"head": self.head.size}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load the head."""
        if facts["head"]:
            self.head = required_tensor(tensors, HEAD, (int(facts["head"]),)).numpy().copy()


class LGFedAvg(SharedHead[Float32]):
    """Averages the heads, weighted by examples."""

    def read(self, client: Client, reply: Received) -> Float32:
        """Read the trained head; its change is limited as a delta is."""
        current = self.current(client)
        head = reply.vector(HEAD, current.size, meaning="weight and bias of the shared head.")
        require_norm(head - current, HEAD, self.max_norm)
        return head

    def learn(self, uploads: Sequence[Upload[Float32]], **_: object) -> None:
        """Replace the head by the mean."""
        self.head = mean_vector(uploads)


class FedGH(SharedHead[ClassMeans]):
    """Trains the head by plain SGD on what the clients' classes look like."""

    def read(self, client: Client, reply: Received) -> ClassMeans:
        """Read the client's class means; their norm is limited as a delta's is."""
        sizes, most = (client.num_classes, client.feature_dim), client.num_examples
        return ClassMeans.read(reply, *sizes, most=most, max_norm=self.max_norm)

    def learn(
        self, uploads: Sequence[Upload[ClassMeans]], *, server_round: int, progress: float
    ) -> None:
        """Train the head for EPOCHS passes over all received means."""
        features_ND, labels_N = stacked([u.content for u in uploads])  # noqa: N806
        section = self.config.baseline
        head = torch.from_numpy(self.current(uploads[0].client).copy()).requires_grad_()
        generator = torch_generator(self.config.run.seed, "fedgh", server_round=server_round)
        for _ in range(EPOCHS):
            for rows in batches(len(labels_N), self.config.training.batch_size, generator):
                loss = functional.cross_entropy(logits(head, features_ND[rows]), labels_N[rows])
                (gradient,) = torch.autograd.grad(loss, head)
                with torch.no_grad():
                    head -= section.baseline_server_lr * gradient
        trained = head.detach().numpy()
        if np.isfinite(trained).all():
            self.head = trained
        else:
            logger.warning("Round %d: FedGH's head diverged and was left as it was", server_round)


def draw_head(num_classes: int, feature_dim: int, generator: torch.Generator) -> Float32:
    """Draw a head (C D + C,) as torch initialises a Linear: uniform within 1 / sqrt(D)."""
    bound = feature_dim**-0.5
    head = torch.empty(num_classes * (feature_dim + 1))
    nn.init.uniform_(head, -bound, bound, generator=generator)
    drawn: Float32 = head.numpy()
    return drawn


def logits(head: Tensor, features_ND: Tensor) -> Tensor:  # noqa: N803
    """Return features (N, D) times the weight, plus the bias, of a head (C D + C,): (N, C)."""
    num_classes = head.numel() // (features_ND.shape[1] + 1)
    weight, bias = head[:-num_classes], head[-num_classes:]
    return functional.linear(features_ND, weight.view(num_classes, -1), bias)


def stacked(uploads: Sequence[ClassMeans]) -> tuple[Tensor, Tensor]:
    """Return all clients' means as examples: features (N, D) and their classes (N,)."""
    features = np.concatenate([upload.means[upload.counts > 0] for upload in uploads])
    labels = np.concatenate([np.flatnonzero(upload.counts > 0) for upload in uploads])
    return torch.from_numpy(features), torch.from_numpy(labels)


def batches(count: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Cut a random order of `count` rows into batches."""
    return torch.split(torch.randperm(count, generator=generator), size)
