"""The client of pFedHN (arXiv 2103.04628): trains what was generated for it, sends the change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from client_app.data.examples import ClientData
from client_app.methods.base import as_array
from client_app.methods.fedavg import FedAvg
from client_app.models.instances import Instance
from client_app.training.loop import Trained, delta, train
from common.messages import DELTA, THETA
from common.records import Arrays, Received


class PFedHN(FedAvg):
    """As FedAvg, but the weights are its own, and training is counted in batches."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train `pfedhn-batches` batches; 0 means the epochs of every other method.

        A participant's own `local-epochs` win. Raises ConfigError where they are more passes than
        its cap.
        """
        batches, section = self.settings.pfedhn_batches, self.training(task)
        if not batches or "local-epochs" in self.participant.node.recipe:
            return self.train(task, instance)
        passes = math.ceil(batches * section.batch_size / self.data.num_train)
        self.participant.node.require_modest({"local-epochs": passes})
        return train(
            instance.model,
            BatchBudget(self.data, batches),
            section.model_copy(update={"local_epochs": 1}),
            generator=self.shuffler("shuffle", task),
        )

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the change, before minus after."""
        sent = self.vector(task, THETA, instance.model.num_parameters)
        return {DELTA: as_array(delta(sent, instance.model.theta.detach()))}


class BatchBudget:
    """A client's examples, epoch after epoch, cut off after a number of batches."""

    def __init__(self, data: ClientData, num_batches: int) -> None:
        self._data, self._num_batches = data, num_batches
        self.num_train, self.num_classes = data.num_train, data.num_classes
        self.loss = data.loss

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield exactly so many batches; every epoch has an order of its own."""
        epochs = (self._data.batches(batch_size, generator) for _ in repeat(None))
        return islice(chain.from_iterable(epochs), self._num_batches)
