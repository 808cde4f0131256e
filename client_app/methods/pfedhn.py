"""The client of pFedHN (arXiv 2103.04628): trains what was generated for it, sends the change."""

from __future__ import annotations

from client_app.methods.base import BatchBudget, as_array
from client_app.methods.fedavg import FedAvg
from client_app.training.loop import Trained, cross_entropy, train
from client_app.workshop import Tool
from common.parameters import delta
from common.parcels import Arrays, Order


class PFedHN(FedAvg):
    """As FedAvg, but the weights are its own, and training is counted in batches."""

    def fit(self, order: Order, tool: Tool) -> Trained:
        """Train `pfedhn-batches` batches; 0 means the epochs of every other method."""
        if not self.settings.pfedhn_batches:
            return self.train(order, tool, cross_entropy)
        return train(
            tool.model,
            BatchBudget(self.participant, self.settings.pfedhn_batches),
            self.training(order).model_copy(update={"local_epochs": 1}),
            generator=self.shuffler("shuffle", order),
        )

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Send the change, before minus after."""
        sent = self.vector(order, "theta", tool.model.num_parameters)
        return {"delta": as_array(delta(sent, tool.model.theta.detach()))}
