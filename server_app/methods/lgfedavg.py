"""LG-FedAvg (Liang et al. 2020, arXiv 2001.01523): own features, shared head.

Here and in FedGH the head is a linear layer from features (D,) to logits (C,); as a vector its
weight (C, D), row-major, then its bias (C,). The server knows C and D, and no more of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.compression import Float32
from common.config import RunConfig
from common.parcels import Arrays, Parcel
from common.seeding import torch_generator
from server_app.clients import Client
from server_app.methods.baseline_base import Baseline, CheckNorm, T, Upload, mean_vector
from server_app.output.checkpoint import required_tensor

HEAD = "head"


class SharedHead(Baseline[T]):
    """Sends everybody the same head.

    Attributes
    ----------
    head : (C D + C,), None until the first client is known.
    """

    needs = frozenset({"num_classes", "feature_dim"})

    def __init__(self, config: RunConfig, check_norm: CheckNorm) -> None:
        super().__init__(config, check_norm)
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

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the head."""
        if self.head is None:
            return {}, {"head": 0}
        return {HEAD: torch.from_numpy(self.head)}, {"head": self.head.size}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the head."""
        if meta["head"]:
            self.head = required_tensor(tensors, HEAD, (int(meta["head"]),)).numpy().copy()


class LGFedAvg(SharedHead[Float32]):
    """Averages the heads, weighted by examples."""

    def read(self, client: Client, parcel: Parcel) -> Float32:
        """Read the trained head; its change is limited as a delta is."""
        current = self.current(client)
        head = parcel.vector(HEAD, current.size, meaning="weight and bias of the shared head.")
        self.check_norm(head - current, HEAD, parcel.source)
        return head

    def fold(self, uploads: Sequence[Upload[Float32]], server_round: int) -> None:
        """Replace the head by the mean."""
        self.head = mean_vector([u.content for u in uploads], [u.num_examples for u in uploads])


def draw_head(num_classes: int, feature_dim: int, generator: torch.Generator) -> Float32:
    """Draw a head (C D + C,) as torch initialises a Linear: uniform within 1 / sqrt(D)."""
    bound = feature_dim**-0.5
    head = torch.empty(num_classes * (feature_dim + 1))
    nn.init.uniform_(head, -bound, bound, generator=generator)
    drawn: Float32 = head.numpy()
    return drawn
