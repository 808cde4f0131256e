"""The clients of LG-FedAvg (arXiv 2001.01523) and FedGH (arXiv 2303.13137): own features."""

from __future__ import annotations

from dataclasses import replace

import torch

from client_app.methods.base import Trainer, as_array
from client_app.methods.features import Head, class_means, head_of, require_head_is_last
from client_app.workshop import Tool, borrow
from common.parcels import Arrays, Order
from common.wire import Registration

HEAD = "head"


class FeatureTrainer(Trainer):
    """A client whose model has a head of a size that all clients share."""

    def declare(self) -> Registration:
        """Add the sizes of the head; raise ModelError when the model has none."""
        data = self.data
        images = data.normalise(data.test_images[:2])
        tool = borrow(self.kind)
        layer = require_head_is_last(tool.model.module, images, data.num_classes).layer
        declared = super().declare()
        return replace(declared, num_classes=data.num_classes, feature_dim=layer.in_features)

    def head(self, tool: Tool) -> Head:
        """Return the head of the own model."""
        return head_of(tool.model.module, self.data.num_classes)


class LGFedAvg(FeatureTrainer):
    """Trains own features under the shared head, and the head too."""

    def receive(self, order: Order, tool: Tool) -> None:
        """Put the shared head on the own features."""
        span = self.head(tool).span
        with torch.no_grad():
            tool.model.theta[span] = self.vector(order, HEAD, span.stop - span.start)

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Send the trained head."""
        return {HEAD: as_array(tool.model.theta[self.head(tool).span])}


class FedGH(LGFedAvg):
    """As LG-FedAvg, but class means of features go up instead of the head."""

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Send the mean feature of every class, after training."""
        return class_means(tool.model.module, self.data, self.head(tool)).arrays()
