"""FedAvg (McMahan et al. 2017, arXiv 1602.05629) and what averages models as it does.

The server cannot draw the first model, for it knows no architecture: in the first round nothing
goes down, every client of a group starts from the same weights (drawn from the run's seed), and
the mean of what comes up is the group's model from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.compression import Float32
from common.config import RunConfig
from common.messages import THETA
from common.records import Arrays, Received, require_norm
from common.serialization import required_tensor
from server_app.clients import Client
from server_app.methods.base import Local, Method, Upload, mean_vector


class FedAvg(Method[Float32]):
    """Averages the models of a group, weighted by examples.

    Attributes
    ----------
    models : theta (P,) by group key; a group is who declared the same tag and size.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.models: dict[str, Float32] = {}
        self._declared: dict[str, str] = {}

    def add_client(self, client: Client) -> None:
        """Drop the model of a group that its last client has left for another."""
        before = self._declared.get(client.client_id)
        self._declared[client.client_id] = self.key(client)
        if before and before not in self._declared.values():
            self.models.pop(before, None)

    def key(self, client: Client) -> str:
        """Return whose model this client shares."""
        return f"{client.group}-{client.num_parameters}"

    def size(self, client: Client) -> int:
        """Return the size of that model."""
        return client.num_parameters

    def download(self, client: Client) -> Arrays:
        """Return the model of the client's group, once there is one."""
        known = self.models.get(self.key(client))
        return {} if known is None else {THETA: known}

    def read(self, client: Client, reply: Received) -> Float32:
        """Read the trained model; its change is limited as a delta is."""
        theta = reply.vector(THETA, self.size(client))
        known = self.models.get(self.key(client))
        require_norm(theta if known is None else theta - known, THETA, self.max_norm)
        return theta

    def learn(self, uploads: Sequence[Upload[Float32]], **_: object) -> None:
        """Replace each group's model by the mean over those of it who answered."""
        for key in {self.key(upload.client) for upload in uploads}:
            self.models[key] = mean_vector([u for u in uploads if self.key(u.client) == key])

    def forget_client(self, client_id: str) -> None:
        """Drop the model of a group that had this client alone: it is that client's."""
        key = self._declared.pop(client_id, "")
        if key not in self._declared.values():
            self.models.pop(key, None)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the groups' models."""
        tensors = {f"model.{key}": torch.from_numpy(theta) for key, theta in self.models.items()}
        sizes = {key: theta.size for key, theta in self.models.items()}
        return tensors, {"models": sizes, "declared": dict(self._declared)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load the groups' models."""
        self._declared = dict(facts["declared"])
        for key, size in facts["models"].items():
            self.models[key] = required_tensor(tensors, f"model.{key}", (size,)).numpy().copy()


class FedAvgFineTuned(FedAvg):
    """FedAvg, whose clients are tested after one epoch of local fine-tuning."""


class FedProx(FedAvg):
    """FedProx (Li et al. 2020, arXiv 1812.06127) differs on the client alone."""


class FML(FedAvg):
    """Federated mutual learning (Shen et al. 2020, arXiv 2006.16765): one auxiliary model for all.

    Clients train `global-model` of the run config beside their own and distil in both directions.
    """

    def key(self, client: Client) -> str:
        """Return the one key there is."""
        return "auxiliary"

    def size(self, client: Client) -> int:
        """Return the size of the auxiliary model."""
        return client.num_global_parameters


class FedKD(FML):
    """FedKD (Wu et al. 2022, arXiv 2108.13323) differs on the client alone."""


class LocalEnsemble(Local):
    """Nothing travels: two models trained alone on each client, and their mixture."""
