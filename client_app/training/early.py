"""Early stopping: a round's training ends where a participant's validation examples say so."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from client_app.data.examples import ClientData
from client_app.data.losses import OwnLoss
from client_app.models.instances import FlatModel
from client_app.training.loop import Loss, Trained, logits_over, loss_of, train
from common.config import TrainingSection
from common.errors import ConfigError


def train_to_best(
    model: FlatModel,
    data: ClientData,
    section: TrainingSection,
    *,
    generator: torch.Generator,
    loss: Loss | None = None,
    clip: bool = True,
) -> Trained:
    """Train in place as `loop.train`, to the epoch with the lowest loss on validation examples.

    Labels are not smoothed there; a loss of the participant's own counts.

    Raises ConfigError where there are none.
    """
    examples = _UntilEnough(data, model, section.local_patience)
    trained = train(model, examples, section, generator=generator, loss=loss, clip=clip)
    examples.restore_best()
    return trained


class _UntilEnough:
    """A client's examples: after `patience` epochs that were no better, epochs have no batches."""

    def __init__(self, data: ClientData, model: FlatModel, patience: int) -> None:
        if not len(data.validation_labels):
            raise ConfigError(
                f"local-patience = {patience} stops training by validation examples, and there are "
                "none. Set validation-fraction = 0.1, say, or local-patience = 0."
            )
        self._data, self._model, self._patience = data, model, patience
        self._epochs, self._waited, self._lowest = 0, 0, math.inf
        self._best: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def num_train(self) -> int:
        """Number of examples."""
        return self._data.num_train

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._data.num_classes

    @property
    def loss(self) -> OwnLoss | None:
        """What is descended in place of the loss of the labels' kind."""
        return self._data.loss

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch's batches as `ClientData.batches`; none once it is enough."""
        if self._epochs and self._waited < self._patience:
            self._judge()
            self._model.module.train()
        if self._waited < self._patience:
            self._epochs += 1
            yield from self._data.batches(batch_size, generator)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the weights and the BatchNorm statistics of the best epoch back into the model."""
        if self._waited < self._patience:
            self._judge()
        assert self._best is not None
        theta, buffers = self._best
        self._model.load(theta)
        for name, buffer in self._model.module.named_buffers():
            buffer.copy_(buffers[name])

    def _judge(self) -> None:
        logits = logits_over(self._model, self._data, validation=True)
        own, labels = self._data.loss, self._data.validation_labels
        found = float(own(logits, labels).mean() if own else loss_of(logits.double(), labels))
        if self._best is None or found < self._lowest:
            self._lowest, self._waited = found, 0
            buffers = {n: b.clone() for n, b in self._model.module.named_buffers()}
            self._best = self._model.theta.detach().clone(), buffers
        else:
            self._waited += 1
