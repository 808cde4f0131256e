"""Models as their own code makes them: drawn from a seed, in any process alike.

Shapes: P trainable scalars of a client's model (the paper's K_i). theta has the layout of
`trainable`: each tensor flattened row-major, one after the other.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client_app.data.several import Parts, take_apart
from client_app.models.registry import build_model
from common.errors import ModelError, listing
from common.log import logger

AUTO = "auto"
"""As a global-model: what `fitting` says."""
DRAWING = threading.RLock()
"""Held while torch's one generator of the process draws: one thread at a time."""


@dataclass(frozen=True)
class ModelKind:
    """Everything a model's construction depends on. `role` keeps student and teacher apart.

    `seed` is the run's; `input_shape` and `input_dtype` are those of one example as a model gets
    it, which shows which parameters get a gradient; (): not looked at. `generate` are patterns of
    the names of those that are shared; "": all that require a gradient. `inputs` say what an
    example of several is taken apart to (`data.several`).
    """

    name: str
    in_channels: int
    num_classes: int
    device: torch.device
    role: str = "personal"
    seed: int = 0
    input_shape: tuple[int, ...] = ()
    input_dtype: torch.dtype = torch.float32
    generate: str = ""
    inputs: tuple[tuple[str, tuple[Any, ...]], ...] = ()


def fitting(shape: tuple[int, ...], *, is_pictures: bool, is_floats: bool) -> str:
    """Return the built-in model that is the common one for examples of a shape.

    >>> fitting((30,), is_pictures=False, is_floats=True)
    'perceptron'
    >>> fitting((3, 64, 64), is_pictures=True, is_floats=True)
    'resnet10'
    """
    if is_pictures:
        return "cnn" if shape[1:] == (32, 32) else "resnet10"  # which takes any size
    if not is_floats:
        return "tokens"
    return "perceptron" if len(shape) == 1 else f"conv{min(len(shape) - 1, 3)}d"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are generated and trained, by name; not the frozen ones."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def num_parameters(model: nn.Module) -> int:
    """Count the trainable scalars of a model; BatchNorm gamma and beta included, buffers not."""
    return sum(p.numel() for p in trainable(model).values())


def flatten(model: nn.Module) -> Tensor:
    """Return a copy of the model's trainable parameters as theta (P,), float32."""
    return torch.cat([p.detach().reshape(-1) for p in trainable(model).values()]).float()


def architecture_tag(module: nn.Module) -> str:
    """Return an opaque tag, equal for models of equal parameter names and shapes (64 bits, hex).

    Who guesses an architecture can confirm the guess: only baselines that average whole models, and
    `head-sharing = "tag"`, ask for the tag.
    """
    shapes = [(name, *p.shape) for name, p in trainable(module).items()]
    return opaque(repr(shapes))


def opaque(text: str) -> str:
    """Return 64 bits of a hash, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_theta(kind: ModelKind, seed: int) -> Tensor:
    """Draw a model's initial parameters (P,), on the CPU, as its own code initialises them.

    The same seed gives the same parameters in every process, so clients of one architecture can
    start alike without anybody sending anything.
    """
    return flatten(built(kind, seed))


def built(kind: ModelKind, seed: int) -> nn.Module:
    """Build a model on the CPU with what it draws from a seed; freeze what gets no gradient."""
    with drawing_from(seed):
        sizes = {"in_channels": kind.in_channels, "num_classes": kind.num_classes}
        module = build_for(kind.name, dict(kind.inputs), **sizes)
        if kind.generate:
            _keep_at_home(module, kind)
        if kind.input_shape and ":" in kind.name:
            shape = (2, *kind.input_shape)
            floats = kind.input_dtype.is_floating_point
            _freeze_unused(module, torch.rand(shape) if floats else torch.zeros(shape).long())
        return module


def build_for(name: str, inputs: Parts, *, in_channels: int, num_classes: int) -> nn.Module:
    """Build a model as `build_model`; one of a participant's own gets several inputs by name."""
    module = build_model(name, in_channels=in_channels, num_classes=num_classes)
    return take_apart(module, inputs) if ":" in name else module


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let torch (on the CPU), numpy and random draw from a seed; their states are put back."""
    with DRAWING, torch.random.fork_rng(devices=[]):
        states = np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(seed)  # the CPU's alone: models are built there
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


@contextmanager
def watching_draws(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Warn where what is done with a model draws from torch's global generator.

    F.dropout and stochastic depth do that inside `forward`, where no generator can be handed in.
    """
    before = _global_state(device)
    yield
    if not torch.equal(before, _global_state(device)):
        logger.warning(
            "%s draws from torch's global generator while it trains (F.dropout, stochastic depth, "
            "torch.rand in forward): two runs may differ. nn.Dropout is seeded.",
            type(model).__name__,
        )


def _global_state(device: torch.device) -> Tensor:
    with DRAWING:  # else it may be another's, who puts it back
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _keep_at_home(module: nn.Module, kind: ModelKind) -> None:
    """Freeze all parameters that no pattern names, and the statistics of BatchNorm beside them.

    Raises ModelError where nothing is left to generate.
    """
    patterns = [pattern.strip() for pattern in kind.generate.split(",")]
    named = trainable(module)
    shared = {name for name in named if any(fnmatchcase(name, p) for p in patterns)}
    if not shared:
        raise ModelError(
            f"model {kind.name!r}: generate = {kind.generate!r} names none of its parameters, "
            f"which are {listing(named, 12)}. Patterns are as in a shell: head.*, *.bias"
        )
    for name, parameter in named.items():
        parameter.requires_grad_(name in shared)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not trainable(layer):
            layer.register_forward_pre_hook(_in_evaluation)


def _in_evaluation(layer: nn.Module, _: object) -> None:
    """Keep a layer in evaluation mode: its statistics are those it came with."""
    layer.eval()


def _freeze_unused(module: nn.Module, inputs: Tensor) -> None:
    """Freeze parameters that no gradient reaches from the logits of inputs (B, ...).

    A backbone under no_grad is meant to stay as it is: weight decay, and what others learn, would
    change it. What cannot be run is left as it is, and says so when it is trained.
    """
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    parameters = trainable(module)
    try:
        logits = module.train()(inputs)
        found = torch.autograd.grad(logits.sum(), [*parameters.values()], allow_unused=True)
    except Exception:  # whatever a participant's model raises, it will again
        return
    finally:
        now = dict(module.named_buffers())
        grown = [
            name for name, b in now.items() if getattr(buffers.get(name), "shape", 0) != b.shape
        ]
        if grown:
            raise ModelError(
                f"{type(module).__name__} makes or resizes the buffer {grown[0]} in forward. "
                "Register it in __init__ with its final size; others would build it without."
            )
        with torch.no_grad():
            for name, buffer in now.items():
                buffer.copy_(buffers[name])
    unused = [name for name, g in zip(parameters, found, strict=True) if g is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    if unused:
        words = "%s: no gradient reaches %d parameters, %s among them: they stay as they are built"
        logger.info(words, type(module).__name__, len(unused), unused[0])
