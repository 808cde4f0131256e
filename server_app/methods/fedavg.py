"""FedAvg (McMahan et al. 2017, arXiv 1602.05629), one model for each group of equal architecture.

The server cannot draw the first model, for it knows no architecture: in the first round nothing
goes down, every client of a group starts from the same weights (drawn from the run's seed), and
the mean of what comes up is the group's model from then on.

Also the server half of FedProx (Li et al. 2020, arXiv 1812.06127), which differs on the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.compression import Float32
from common.config import RunConfig
from common.parcels import Arrays, Parcel
from server_app.clients import Client
from server_app.methods.baseline_base import Baseline, CheckNorm, Upload, mean_vector
from server_app.output.checkpoint import required_tensor

THETA = "theta"


class FedAvg(Baseline[Float32]):
    """Averages the models of a group, weighted by examples.

    Attributes
    ----------
    models : theta (P,) by group key; a group is who declared the same tag and size.
    """

    needs = frozenset({"group"})

    def __init__(self, config: RunConfig, check_norm: CheckNorm) -> None:
        super().__init__(config, check_norm)
        self.models: dict[str, Float32] = {}

    def key(self, client: Client) -> str:
        """Return whose model this client shares."""
        return f"{client.group}-{client.num_parameters}"

    def download(self, client: Client) -> Arrays:
        """Return the model of the client's group, once there is one."""
        known = self.models.get(self.key(client))
        return {} if known is None else {THETA: known}

    def read(self, client: Client, parcel: Parcel) -> Float32:
        """Read the trained model; its change is limited as a delta is."""
        theta = parcel.vector(THETA, client.num_parameters)
        known = self.models.get(self.key(client))
        self.check_norm(theta if known is None else theta - known, THETA, parcel.source)
        return theta

    def fold(self, uploads: Sequence[Upload[Float32]], server_round: int) -> None:
        """Replace each group's model by the mean over those of it who answered."""
        for key in {self.key(upload.client) for upload in uploads}:
            mine = [upload for upload in uploads if self.key(upload.client) == key]
            self.models[key] = mean_vector(
                [upload.content for upload in mine], [upload.num_examples for upload in mine]
            )

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the groups' models."""
        tensors = {f"model.{key}": torch.from_numpy(theta) for key, theta in self.models.items()}
        return tensors, {"models": {key: theta.size for key, theta in self.models.items()}}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the groups' models."""
        for key, size in meta["models"].items():
            self.models[key] = required_tensor(tensors, f"model.{key}", (size,)).numpy().copy()


class FedAvgFineTuned(FedAvg):
    """FedAvg, tested after one epoch of local fine-tuning; the global model's accuracy too."""

    others = ("global",)
