"""What a participant descends in place of its labels' loss, and how well numbers are met."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from client_app.data.source import CLASSES, NUMBERS
from client_app.plugins import load_callable
from common.errors import ConfigError, ModelError, unknown_name

OwnLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, C), labels (B,) or (B, C)) -> the loss of each example (B,)."""
BALANCED, ABSOLUTE = "balanced", "absolute"


@dataclass(frozen=True)
class Weighted:
    """The cross-entropy of each example in nats, times the weight of its class.

    `weights` (C,) float32 are one participant's; (G, C) those of G participants, whose examples,
    equally many each, come one participant after the other.
    """

    weights: Tensor

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example (B,) of outputs (B, C) and labels (B,)."""
        rows = self.weights.view(-1, outputs.shape[1])
        weights = rows.gather(1, labels.view(len(rows), -1)).flatten()
        return weights * torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


def own_loss(name: str, train_labels: Tensor, target: str, num_classes: int) -> OwnLoss | None:
    """Return the loss that `loss` names, None for "": that of the labels' kind.

    Raises ConfigError where it is not for such labels, ModelError where it cannot be imported.
    """
    if not name:
        return None
    if ":" in name:
        found = load_callable(name, key="loss", error=ModelError, example="my_site:focal")
        return lambda outputs, labels: _of_each(name, found(outputs, labels), outputs)
    given, kinds = _weights_in(name), {BALANCED: CLASSES, ABSOLUTE: NUMBERS}
    if not given and name not in kinds:
        raise ConfigError(
            f"{unknown_name('loss', name, kinds)} Or 'module:function' of your own, or a weight "
            "for each class: '1, 5'."
        )
    kind = CLASSES if given else kinds[name]
    if kind != target:
        raise ConfigError(f"loss = {name!r} is for {kind}; here are {target}.")
    if name == ABSOLUTE:
        return lambda outputs, labels: (outputs - labels).abs().mean(1)
    counts = train_labels.bincount(minlength=num_classes).double()
    if not given:
        return _weighted(name, 1 / counts.clamp_min(1), counts)
    if len(given) != num_classes:
        raise ConfigError(
            f"loss = {name!r} has {len(given)} weights, and there are {num_classes} classes. Give "
            "one for each, in the order of class-names, or of your folders' names."
        )
    return _weighted(name, counts.new_tensor(given), counts)


def _weights_in(text: str) -> list[float]:
    """Return the weights of a comma list, none of a word; raise ConfigError at a bad one."""
    parts, found = [part.strip() for part in text.split(",")], list[float]()
    for part in parts:
        try:
            found.append(float(part))
        except ValueError:
            if len(parts) == 1:
                return []
            found.append(math.nan)
        if not 0 <= found[-1] < math.inf:
            raise ConfigError(
                f"loss = {text!r}: {part!r} is no weight of a class; expected numbers from 0 on, "
                "one for each class, separated by commas: '1, 5, 2.5'."
            )
    return found


def _weighted(name: str, weights: Tensor, counts: Tensor) -> Weighted:
    """Scale weights of classes (C,) so that those of the train examples are 1 on average.

    The learning rate then means what it does without weights.
    """
    weights = weights / weights.max().clamp_min(torch.finfo(weights.dtype).tiny)
    total = (weights * counts).sum()
    if not total:
        raise ConfigError(
            f"loss = {name!r}: every class of which there are examples to train on weighs 0, and "
            "nothing would be learned. Give at least one of them a weight."
        )
    return Weighted((weights * (counts.sum() / total)).float())


def _of_each(name: str, losses: object, outputs: Tensor) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (len(outputs),):
        shape = getattr(losses, "shape", None)
        came = type(losses).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ModelError(
            f"loss = {name!r} must return the loss of each example, a tensor ({len(outputs)},); "
            f"got {came}. Leave out the mean, or use reduction='none'."
        )
    return losses


def explained(outputs: Tensor, wanted: Tensor) -> float:
    """Return the coefficient of determination R^2, the mean over numbers (B, C), at most 1.

    Of a number that does not vary it is 1 where all are met, else 0.
    """
    outputs, wanted = outputs.double(), wanted.double()
    errors_C = (outputs - wanted).square().sum(0)  # noqa: N806
    spread_C = (wanted - wanted.mean(0)).square().sum(0)  # noqa: N806
    met = (errors_C == 0).double()
    return float(torch.where(spread_C > 0, 1 - errors_C / spread_C, met).mean())
