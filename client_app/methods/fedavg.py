"""The clients of FedAvg (McMahan et al. 2017, arXiv 1602.05629) and FedProx (arXiv 1812.06127)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from client_app.methods.base import THETA, Trainer, as_array
from client_app.training.loop import Trained, cross_entropy, evaluate, train
from client_app.workshop import Tool, architecture_tag, borrow
from common.parcels import Arrays, Order
from common.wire import Evaluation, Registration


class FedAvg(Trainer):
    """Trains the model of its group; BatchNorm statistics stay here, as with every method."""

    keeps_theta = False

    def declare(self) -> Registration:
        """Add an opaque tag by which the server groups equal architectures."""
        return replace(super().declare(), group=architecture_tag(borrow(self.kind)))

    def receive(self, order: Order, tool: Tool) -> None:
        """Take the group's model; there is none before the first mean."""
        if THETA in order.parcel:
            tool.model.load(self.vector(order, THETA, tool.model.num_parameters))

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Send the trained model."""
        return {THETA: as_array(tool.model.theta)}


class FedAvgFineTuned(FedAvg):
    """FedAvg, tested after one epoch of local training on top of the received model."""

    def measure(self, order: Order, tool: Tool) -> Evaluation:
        """Test the model as received, then after the epoch; the latter counts."""
        received = evaluate(tool.model, self.data)
        self.adapt(order, tool)
        tuned = evaluate(tool.model, self.data)
        seconds = received.seconds + tuned.seconds
        return replace(tuned, seconds=seconds, others={"global": received.num_correct})

    def adapt(self, order: Order, tool: Tool) -> None:
        """Train one epoch; what it changes is not kept."""
        section = self.participant.config.training.model_copy(update={"local_epochs": 1})
        train(tool.model, self.data, section, generator=self.shuffler("fine-tune", order))


class FedProx(FedAvg):
    """FedAvg with mu / 2 |theta - theta_received|^2 in the loss."""

    def fit(self, order: Order, tool: Tool) -> Trained:
        """Train with the proximal term."""
        received = tool.model.theta.detach().clone()
        parameters = list(tool.model.module.parameters())

        def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
            theta = torch.cat([p.reshape(-1) for p in parameters])
            distance = (theta - received).square().sum()
            return cross_entropy(images, logits, labels) + self.settings.fedprox_mu / 2 * distance

        return self.train(order, tool, loss)
