"""Model names -> models. The stable entry point for instances is `build_model`.

A name is one of `MODEL_NAMES`, or `module:factory` for a participant's own model: a callable
`factory(*, in_channels: int, num_classes: int) -> torch.nn.Module`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import nn

from client_app.models.cnn import CNN
from client_app.models.mlp import MLP
from client_app.models.resnet import STAGES, ResNet
from client_app.models.squeezenet import STEM, SqueezeNet
from client_app.models.tensors import Convolutional, Perceptron, TokenMean
from client_app.models.vgg import VGG8
from client_app.models.vit import ViT
from client_app.plugins import load_callable
from common.errors import ConfigError, ModelError, unknown_name

Factory = Callable[..., nn.Module]

_SEEN: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""Trainable parameters of participants' own models that are in use, by id."""

_FAMILIES: dict[str, Factory] = {
    "cnn": CNN,
    "vgg8": VGG8,
    **{name: partial(ResNet, stages) for name, stages in STAGES.items()},
    "mlp": MLP,
    **{name: partial(SqueezeNet, name) for name in STEM},
    "vit": ViT,
    "perceptron": Perceptron,
    **{f"conv{axes}d": partial(Convolutional, axes) for axes in (1, 2, 3)},
    "tokens": TokenMean,
}
MODEL_NAMES: tuple[str, ...] = tuple(_FAMILIES)


def build_model(name: str, *, in_channels: int, num_classes: int) -> nn.Module:
    """Build a client's model with torch's default initialisation, on the CPU, float32.

    Raises ModelError where the name is unknown, or a user's factory cannot be imported, fails, or
    returns something whose parameters the hypernetwork cannot generate.
    """
    if min(in_channels, num_classes) < 1:
        raise ModelError(
            f"model {name!r} needs in_channels and num_classes of at least 1, "
            f"got {in_channels} and {num_classes}."
        )
    if ":" in name:
        return _build_own(name, in_channels=in_channels, num_classes=num_classes)
    _require_known(name, ModelError)
    return _FAMILIES[name](in_channels=in_channels, num_classes=num_classes)


@lru_cache(maxsize=1024)
def model_for_partition(models: str, partition_id: int, num_partitions: int) -> str:
    """Choose a client's model: contiguous blocks of clients, in the order of the names.

    `models` is one name, or several separated by commas (method.md, "Five-model runs");
    `partition_id` is from 0 to num_partitions - 1, any value when there is only one name. Raises
    ConfigError where a name is unknown or missing, or partition_id names no block.
    """
    names = [name.strip() for name in models.split(",")]
    if not all(names):
        raise ConfigError(f"models = {models!r} has an empty name. Separate names by one comma.")
    for name in names:
        if ":" not in name:
            _require_known(name, ConfigError)
    if len(names) == 1:
        return names[0]
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"models = {models!r} names {len(names)} models, one for each block of clients, but "
            f"partition-id = {partition_id} is not in 0..{num_partitions - 1}. A participant "
            "without a partition names one model in its node config: model = 'cnn'."
        )
    return names[partition_id * len(names) // num_partitions]


def _require_known(name: str, error: type[ModelError] | type[ConfigError]) -> None:
    if name not in _FAMILIES:
        raise error(unknown_name("model", name, MODEL_NAMES) + " Or 'module:factory' for your own.")


def _build_own(spec: str, *, in_channels: int, num_classes: int) -> nn.Module:
    factory = load_callable(spec, key="model", error=ModelError, example="my_models:small_net")
    sizes = {"in_channels": in_channels, "num_classes": num_classes}
    try:
        inspect.signature(factory).bind(**sizes)
    except TypeError as cause:
        raise ModelError(
            f"model {spec!r} must accept the keywords in_channels and num_classes: {cause}."
        ) from cause
    try:
        model = factory(**sizes)
    except Exception as cause:  # a participant's code may raise anything; name whose it was
        raise ModelError(
            f"model {spec!r} raised {type(cause).__name__} for in_channels={in_channels}, "
            f"num_classes={num_classes}: {cause}"
        ) from cause
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {spec!r} returned a {type(model).__name__}, not torch.nn.Module.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(f"model {spec!r} has no trainable parameters: nothing can be generated.")
    for name, parameter in parameters.items():
        if fault := _fault(parameter):
            raise ModelError(f"model {spec!r}: {name} {fault}")
    if any(_SEEN.get(id(parameter)) is parameter for parameter in parameters.values()):
        raise ModelError(
            f"model {spec!r} returned the same parameters as in an earlier call: several models "
            "would train on one another's weights. Build a new model in every call; no lru_cache, "
            "and no model that is built once for the module."
        )
    _SEEN.update({id(parameter): parameter for parameter in parameters.values()})
    return model


def _fault(parameter: nn.Parameter) -> str:
    """Say why a hypernetwork cannot generate a parameter; "" when it can."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return (
            "is lazy and has no shape yet. Give every layer its sizes; the server must know the "
            "number of parameters before the first batch."
        )
    if parameter.dtype != torch.float32:
        return f"is {parameter.dtype}, expected float32. Return model.float()."
    return ""
