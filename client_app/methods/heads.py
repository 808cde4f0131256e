"""The clients of LG-FedAvg (arXiv 2001.01523) and FedGH (arXiv 2303.13137): own features."""

from __future__ import annotations

import torch

from client_app.methods.base import Method, as_array
from client_app.methods.features import class_means, head_of
from client_app.workshop import Tool
from common.messages import HEAD
from common.records import Arrays, Received


class LGFedAvg(Method):
    """Trains own features under the shared head, and the head too."""

    def receive(self, task: Received, tool: Tool) -> None:
        """Put the shared head on the own features."""
        span = head_of(tool.model.module, self.data.num_classes).span
        with torch.no_grad():
            tool.model.theta[span] = self.vector(task, HEAD, span.stop - span.start)

    def collect(self, task: Received, tool: Tool) -> Arrays:
        """Send the trained head."""
        return {
            HEAD: as_array(tool.model.theta[head_of(tool.model.module, self.data.num_classes).span])
        }


class FedGH(LGFedAvg):
    """As LG-FedAvg, but class means of features go up instead of the head."""

    def collect(self, task: Received, tool: Tool) -> Arrays:
        """Send the mean feature of every class, after training."""
        return class_means(
            tool.model.module, self.data, head_of(tool.model.module, self.data.num_classes)
        ).arrays()
