"""The client of pFedHN (arXiv 2103.04628): trains what was generated for it, sends the change."""

from __future__ import annotations

from client_app.methods.base import BatchBudget, as_array
from client_app.methods.fedavg import FedAvg
from client_app.training.loop import Trained, cross_entropy, train
from client_app.workshop import Tool
from common.config import TrainingSection
from common.messages import DELTA, THETA
from common.parameters import delta
from common.records import Arrays, Received


class PFedHN(FedAvg):
    """As FedAvg, but the weights are its own, and training is counted in batches."""

    def fit(self, task: Received, tool: Tool) -> Trained:
        """Train `pfedhn-batches` batches; 0 means the epochs of every other method."""
        if not self.settings.pfedhn_batches:
            return self.train(task, tool, cross_entropy)
        return train(
            tool.model,
            BatchBudget(self.data, self.settings.pfedhn_batches),
            task.section(TrainingSection).model_copy(update={"local_epochs": 1}),
            generator=self.shuffler("shuffle", task),
        )

    def collect(self, task: Received, tool: Tool) -> Arrays:
        """Send the change, before minus after."""
        sent = self.vector(task, THETA, tool.model.num_parameters)
        return {DELTA: as_array(delta(sent, tool.model.theta.detach()))}
