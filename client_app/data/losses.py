"""What a participant descends in place of its labels' loss, and how well numbers are met."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from client_app.data.source import CLASSES, NUMBERS
from client_app.plugins import load_callable
from common.errors import ConfigError, ModelError, unknown_name

OwnLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, C), labels (B,) or (B, C)) -> the loss of each example (B,)."""


def own_loss(name: str, train_labels: Tensor, target: str, num_classes: int) -> OwnLoss | None:
    """Return the loss that `loss` names, None for "": that of the labels' kind.

    Raises ConfigError where it is not for such labels, ModelError where it cannot be imported.
    """
    if not name:
        return None
    if ":" in name:
        found = load_callable(name, key="loss", error=ModelError, example="my_site:focal")
        return lambda outputs, labels: _of_each(name, found(outputs, labels), outputs)
    kinds = {"balanced": CLASSES, "absolute": NUMBERS}
    if name not in kinds:
        raise ConfigError(unknown_name("loss", name, kinds) + " Or 'module:function' of your own.")
    if kinds[name] != target:
        raise ConfigError(f"loss = {name!r} is for {kinds[name]}; here are {target}.")
    if name == "absolute":
        return lambda outputs, labels: (outputs - labels).abs().mean(1)
    counts = train_labels.bincount(minlength=num_classes)
    weights = len(train_labels) / (counts.clamp_min(1) * (counts > 0).sum())
    return lambda outputs, labels: (
        weights[labels] * torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
    )


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
