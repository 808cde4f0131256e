"""The clients of LG-FedAvg (arXiv 2001.01523) and FedGH (arXiv 2303.13137): own features."""

from __future__ import annotations

import torch

from client_app.methods.base import Method, as_array
from client_app.methods.features import class_means
from client_app.models.instances import Instance
from common.messages import HEAD
from common.records import Arrays, Received


class LGFedAvg(Method):
    """Trains own features under the shared head, and the head too."""

    def receive(self, task: Received, instance: Instance) -> None:
        """Put the shared head on the own features."""
        span = self.head(instance).span
        with torch.no_grad():
            instance.model.theta[span] = self.vector(task, HEAD, span.stop - span.start)

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the trained head."""
        span = self.head(instance).span
        return {HEAD: as_array(instance.model.theta[span])}


class FedGH(LGFedAvg):
    """As LG-FedAvg, but class means of features go up instead of the head."""

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the mean feature of every class, after training."""
        return class_means(instance.model.module, self.data, self.head(instance)).arrays()
