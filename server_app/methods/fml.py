"""FML, federated mutual learning (Shen et al. 2020, arXiv 2006.16765).

The small auxiliary model that clients train beside their own, and distil with it in both
directions, is averaged as FedAvg does; it is `global-model` of the run config.
"""

from __future__ import annotations

from common.compression import Float32
from common.parcels import Parcel
from server_app.clients import Client
from server_app.methods.fedavg import THETA, FedAvg


class FML(FedAvg):
    """One group: everybody has the same auxiliary model."""

    needs = frozenset({"num_global_parameters"})

    def key(self, client: Client) -> str:
        """Return the one key there is."""
        return "auxiliary"

    def read(self, client: Client, parcel: Parcel) -> Float32:
        """Read the trained auxiliary model."""
        theta = parcel.vector(THETA, client.num_global_parameters)
        known = self.models.get(self.key(client))
        self.check_norm(theta if known is None else theta - known, THETA, parcel.source)
        return theta
