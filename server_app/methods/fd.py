"""FD, federated distillation (Jeong et al. 2018, arXiv 1811.11479): class-mean logits travel.

Differs from paper: every client gets the mean over all clients, its own logits included.
"""

from __future__ import annotations

from common.wire import Registration
from server_app.clients import Client
from server_app.methods.fedproto import FedProto


class FD(FedProto):
    """FedProto's average, of logits (C,) for each of C classes."""

    needs = frozenset({"num_classes"})
    others = ()

    def sizes(self, registration: Registration) -> dict[str, int]:
        """Add a row of logits for every class."""
        return super().sizes(registration) | {"mean logits": registration.num_classes**2}

    def dim(self, client: Client) -> int:
        """Return the number of classes: one logit for each."""
        return client.num_classes
