"""FedGH (Yi et al. 2023, arXiv 2303.13137): the server trains the head on clients' class means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.class_means import MEANS, ClassMeans
from common.log import logger
from common.parcels import Parcel
from common.seeding import torch_generator
from server_app.clients import Client
from server_app.methods.baseline_base import Upload
from server_app.methods.lgfedavg import SharedHead

EPOCHS = 1
"""The server's passes over the received means in a round."""


class FedGH(SharedHead[ClassMeans]):
    """Own features; a head trained by plain SGD on what the clients' classes look like."""

    def read(self, client: Client, parcel: Parcel) -> ClassMeans:
        """Read the client's class means; their norm is limited as a delta's is."""
        upload = ClassMeans.read(parcel, client.num_classes, client.feature_dim)
        self.check_norm(upload.means, MEANS, parcel.source)
        return upload

    def fold(self, uploads: Sequence[Upload[ClassMeans]], server_round: int) -> None:
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
