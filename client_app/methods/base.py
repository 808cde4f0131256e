"""The client half of a baseline: what it receives, how it trains, what it sends, what it keeps.

A round is four hops, each of which a baseline may replace: `receive` -> `fit` -> `keep` ->
`collect`; and `measure` for the test. What is not replaced is Local: one's own model, trained as
every method trains, of which nothing travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice, repeat
from typing import ClassVar

import torch
from torch import Tensor

from client_app.participant import Participant
from client_app.store import Stamp
from client_app.training.loop import Loss, Trained, cross_entropy, evaluate, train
from client_app.workshop import ModelKind, Tool, borrow, draw_theta
from common.compression import Float32
from common.config import TrainingSection
from common.errors import WireError
from common.parcels import Arrays, Order
from common.seeding import stream_seed, torch_generator
from common.wire import Evaluation, Registration

OWN, THETA, BUFFER = "own_model", "theta", "buffer/"


class Trainer:
    """One baseline on one client, for the duration of one message.

    Attributes
    ----------
    keeps_theta : whether the personal model's weights stay here from round to round; buffers
        (BatchNorm statistics) always do.
    """

    keeps_theta: ClassVar[bool] = True

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        self.data = participant.data
        self.settings = participant.config.baseline

    # --- the hooks -------------------------------------------------------------------------------

    def declare(self) -> Registration:
        """Say who this is and how large its model is; some baselines add to it."""
        return Registration(
            client_id=self.participant.client_id,
            num_parameters=borrow(self.kind).model.num_parameters,
            num_examples=self.data.num_train,
        )

    def receive(self, order: Order, tool: Tool) -> None:
        """Overwrite a part or all of the own model with what came; raise WireError if bad."""

    def fit(self, order: Order, tool: Tool) -> Trained:
        """Train the model in place."""
        return self.train(order, tool, cross_entropy)

    def collect(self, order: Order, tool: Tool) -> Arrays:
        """Return what goes up after training."""
        return {}

    def measure(self, order: Order, tool: Tool) -> Evaluation:
        """Test the model as it is after `receive`."""
        return evaluate(tool.model, self.data)

    def adapt(self, order: Order, tool: Tool) -> None:
        """Make the model what this client will use from now on (finish)."""

    # --- around them -----------------------------------------------------------------------------

    def ready(self, order: Order, *, before: int) -> Tool:
        """Load the own model of a round earlier than `before`, or its first weights, and receive.

        Raises
        ------
        WireError
            The message does not hold what this baseline's server sends.
        """
        tool = borrow(self.kind)
        self.load(tool, OWN, order, before=before)
        self.receive(order, tool)
        return tool

    def load(self, tool: Tool, name: str, order: Order, *, before: int) -> None:
        """Load a kept model; what is missing or of another size starts as it was drawn."""
        participant, now = self.participant, order.header.server_round
        kept: Mapping[str, Tensor] = participant.state.load(name, before=before) or {}
        buffers = {k.removeprefix(BUFFER): x for k, x in kept.items() if k.startswith(BUFFER)}
        seed = participant.config.run.seed
        tool.reset(buffers, stream_seed(seed, f"dropout/{name}", now, participant.client_id))
        theta = kept.get(THETA)
        if theta is None or theta.shape != tool.model.theta.shape:
            theta = self.first_theta(tool, name)
        tool.model.load(theta.to(participant.device))

    def first_theta(self, tool: Tool, name: str) -> Tensor:
        """Draw the first weights: the same for all clients of one architecture."""
        return draw_theta(self.kind, stream_seed(self.participant.config.run.seed, "first-theta"))

    def keep(self, order: Order, tool: Tool, name: str = OWN, *, theta: bool = True) -> None:
        """Keep a model for later rounds, on this client alone."""
        kept = {BUFFER + key: x for key, x in tool.buffers().items()}
        if theta:
            kept[THETA] = tool.model.theta.detach()
        if kept:
            # twice, as for the method: the newest checkpoint may turn out to be damaged
            rounds = 2 * self.participant.config.run.checkpoint_every
            stamp = Stamp(order.header.server_round, rounds)
            self.participant.state.save(name, kept, stamp=stamp)

    def train(self, order: Order, tool: Tool, loss: Loss) -> Trained:
        """Train as every method does, with a loss."""
        return train(
            tool.model,
            self.data,
            self.training(order),
            generator=self.shuffler("shuffle", order),
            loss=loss,
        )

    def training(self, order: Order) -> TrainingSection:
        """Return the hyperparameters that the server sent."""
        if order.training is None:
            raise WireError(f"{order.parcel.source}: it asks for no training.")
        return order.training

    def shuffler(self, purpose: str, order: Order) -> torch.Generator:
        """Make the generator that shuffles the examples; the method's draws the same orders."""
        return torch_generator(
            self.participant.config.run.seed,
            purpose,
            server_round=order.header.server_round,
            client_id=self.participant.client_id,
        )

    def vector(self, order: Order, name: str, length: int) -> Tensor:
        """Read a received vector (length,) on the device."""
        return torch.from_numpy(order.parcel.vector(name, length)).to(self.participant.device)

    @property
    def kind(self) -> ModelKind:
        """What the construction of the own model depends on."""
        return self.participant.kind


def as_array(x: Tensor) -> Float32:
    """Copy a vector off the device, to be sent."""
    array: Float32 = x.detach().cpu().numpy().copy()
    return array


class BatchBudget:
    """A client's examples, epoch after epoch, cut off after a number of batches."""

    def __init__(self, participant: Participant, num_batches: int) -> None:
        self._data, self._num_batches = participant.data, num_batches
        self.num_train, self.num_classes = self._data.num_train, self._data.num_classes

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield exactly so many batches; every epoch has an order of its own."""
        epochs = (self._data.batches(batch_size, generator) for _ in repeat(None))
        return islice(chain.from_iterable(epochs), self._num_batches)
