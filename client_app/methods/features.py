"""A model's head and the features before it, for baselines that share one or the other.

The head is the last `nn.Linear` that ends in as many outputs as there are classes; the feature is
its input. All families but SqueezeNet have one.

Shapes: B batch, N examples, C classes, D feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from client_app.data.examples import ClientData
from client_app.models.building import trainable
from client_app.training.loop import TEST_BATCH
from common.class_means import ClassMeans
from common.errors import ModelError


@dataclass(frozen=True)
class Head:
    """A model's last layer, and where its weight (C, D) and bias (C,) lie in theta."""

    layer: nn.Linear
    span: slice


class Tap:
    """The features of the newest forward pass, (B, D), with their graph."""

    features: Tensor


def head_of(module: nn.Module, num_classes: int) -> Head:
    """Find a model's head; raise ModelError where it does not end in a Linear with a bias."""
    named = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == num_classes
    ]
    if not named or named[-1][1].bias is None:
        raise ModelError(
            f"{type(module).__name__} has no head: methods that share heads or features need a "
            f"model that ends in Linear(D, {num_classes}) with a bias. Choose cnn, vgg8, resnet10, "
            "resnet12, resnet18, mlp or vit, or end your own model that way; local, fd, fml and "
            "mh-pfedhn take any model."
        )
    name, layer = named[-1]
    start, sizes = 0, {key: p.numel() for key, p in trainable(module).items()}
    for key, size in sizes.items():
        if key == f"{name}.weight":
            break
        start += size
    return Head(layer, slice(start, start + layer.weight.numel() + num_classes))


def require_head_is_last(module: nn.Module, images: Tensor, num_classes: int) -> Head:
    """Find the head; raise ModelError unless, on images (B, ...), its outputs are the logits."""
    head = head_of(module, num_classes)
    outputs: list[Tensor] = []
    handle = head.layer.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    module.eval()
    try:
        with torch.no_grad():
            logits = module(images)
    finally:
        handle.remove()
    if len(outputs) != 1 or outputs[0].shape != logits.shape or not torch.equal(outputs[0], logits):
        raise ModelError(
            f"{type(module).__name__} does not end in its Linear(D, {num_classes}): its logits are "
            "not that layer's outputs. Methods that share heads or features need such an end."
        )
    return head


@contextmanager
def tapped(head: Head) -> Iterator[Tap]:
    """Note the features of every forward pass made within the block."""
    tap = Tap()

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tap.features = inputs[0]

    handle = head.layer.register_forward_pre_hook(note)
    try:
        yield tap
    finally:
        handle.remove()


@torch.no_grad()
def class_means(module: nn.Module, data: ClientData, head: Head | None) -> ClassMeans:
    """Average the features (or without a head the logits) of the train examples by class.

    The model is in evaluation mode, so that each example has one feature whatever its batch.
    """
    module.eval()
    size = TEST_BATCH.get(data.train_labels.device.type, 256)
    found: list[Tensor] = []
    for start in range(0, data.num_train, size):
        images = data.normalise(data.train_images[start : start + size])
        if head is None:
            found.append(module(images))
            continue
        with tapped(head) as tap:
            module(images)
        found.append(tap.features)
    vectors = torch.cat(found).cpu().numpy().astype(np.float32)
    return ClassMeans.of(vectors, data.train_labels.cpu().numpy(), data.num_classes)
