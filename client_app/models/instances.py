"""Models ready for use: built once per thread, reset for each message.

A process serves many simulated clients. Building a model costs milliseconds and memory, so each
thread keeps one of every kind; loading theta and buffers makes it the next client's.

Its dropout has a generator of its own, seeded for each client and round: torch's draws from the
global one, so results would depend on who ran before, and on threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from client_app.models.building import ModelKind, built, draw_theta, flatten, trainable
from client_app.training.allocator import keep_freed_memory
from client_app.training.recording import GraphCapture, Recorder
from common.errors import ConfigError, ModelError
from common.log import logger
from common.seeding import stream_seed

_own = threading.local()


class FlatModel:
    """A model whose trainable parameters are views into one flat vector.

    Loading `theta` (P,), float32, is one copy, reading it none, and an optimiser sees a single
    tensor however many layers the model has. `theta.grad` (P,) has all gradients. What is frozen
    stays as it was built. `recorder` records its training steps; None: they run as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        if not trainable(module):
            raise ModelError(f"{type(module).__name__} has no trainable parameters to generate.")
        self.module, self.has_trained = module, False
        self.theta = nn.Parameter(flatten(module))
        self.theta.grad = torch.zeros_like(self.theta)
        self.recorder: Recorder | None = None
        if self.theta.is_cuda:
            self.recorder = Recorder(module, self.theta, GraphCapture(self.theta.device))
        self._named = trainable(module)
        self._parameters = list(self._named.values())
        offset = 0
        for parameter in self._parameters:
            parameter.data = self.theta.data[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    @property
    def num_parameters(self) -> int:
        """P, the paper's K_i."""
        return self.theta.numel()

    @property
    def gradient(self) -> Tensor:
        """`theta.grad` (P,)."""
        assert self.theta.grad is not None
        return self.theta.grad

    @torch.no_grad()
    def load(self, theta: Tensor) -> None:
        """Overwrite all parameters with theta (P,); raise ModelError at another length."""
        if theta.shape != self.theta.shape:
            raise ModelError(
                f"theta has {tuple(theta.shape)} entries; this model has ({self.num_parameters},)."
            )
        self.theta.copy_(theta)

    def require_views(self) -> None:
        """Raise ModelError where the model has put another tensor in a parameter's place.

        It would compute with a tensor that nobody trains, sends or stores.
        """
        now, place = dict(self.module.named_parameters()), self.theta.data_ptr()
        for name, parameter in self._named.items():
            if now.get(name) is not parameter or parameter.data_ptr() != place:
                raise ModelError(
                    f"{type(self.module).__name__} has replaced the tensor of {name}, in forward "
                    f"perhaps ({name}.data = ...). Change it in place: with torch.no_grad(): "
                    f"{name}.copy_(...)."
                )
            place += 4 * parameter.numel()

    def backward(self, loss: Tensor) -> None:
        """Overwrite `theta.grad` (P,) with the gradient of a scalar loss, 0 where there is none."""
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self.gradient)


@dataclass
class Instance:
    """A model with the buffers it was born with and the generator of its dropout."""

    kind: ModelKind
    model: FlatModel
    fresh_buffers: dict[str, Tensor]
    generator: torch.Generator

    def reset(self, buffers: Mapping[str, Tensor] | None, seed: int) -> None:
        """Load a client's buffers (or fresh ones) and seed the dropout."""
        fitting = self.fitting(buffers)
        with torch.no_grad():
            for name, buffer in self.model.module.named_buffers():
                buffer.copy_(fitting[name])
        self.generator.manual_seed(seed)

    def fitting(self, buffers: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return a client's buffers on the device; fresh ones where it has none of that shape."""
        found = {}
        for name, fresh in self.fresh_buffers.items():
            kept = (buffers or {}).get(name)
            fits = kept is not None and kept.shape == fresh.shape
            found[name] = kept.to(fresh) if fits and kept is not None else fresh
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers: BatchNorm statistics and the like."""
        return {name: b.detach().clone() for name, b in self.model.module.named_buffers()}


def instance_of(kind: ModelKind) -> Instance:
    """Return this thread's model of a kind; call `reset` and load theta before use."""
    instances: dict[ModelKind, Instance] = _own.__dict__.setdefault("instances", {})
    if kind not in instances:
        keep_freed_memory()
        module = built(kind, stream_seed(kind.seed, "model")).to(kind.device)
        generator = torch.Generator(device=kind.device)
        seed_dropout(module, generator)
        fresh = {name: b.detach().clone() for name, b in module.named_buffers()}
        instances[kind] = Instance(kind, FlatModel(module), fresh, generator)
    return instances[kind]


@lru_cache(maxsize=16)
def _offset_theta(kind: ModelKind, seed: int) -> Tensor:
    return draw_theta(kind, seed).to(kind.device)


def offset_theta(kind: ModelKind, seed: int) -> Tensor:
    """Return `draw_theta` on the kind's device, whatever its role; kept: every message needs it."""
    return _offset_theta(replace(kind, role=""), seed)


def pick_device(wish: str) -> torch.device:
    """Return the device to train on; `auto` takes CUDA where there is one, then the CPU.

    Raises ConfigError where the wish is no torch device, or a GPU that this machine does not have.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise ConfigError(
            f"device = {wish!r} is no torch device: use auto, cpu or cuda:0."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {wish!r}, but torch sees no GPU here. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device = {wish!r}, but torch sees {count} GPU(s) here, from cuda:0 on.")
    return device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with `count` torch CPU threads (0: leave it); results depend on it bit for bit."""
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# number of leading axes that get an entry of the mask of their own; 0 means all axes
_MASK_AXES = {nn.Dropout: 0, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2}


@dataclass
class MaskFeed:
    """Stands in for the generators while several clients are trained at once (`training.batched`).

    With `masks` the layers use them in the order in which they are called; without, they note in
    `wanted` what they would draw: (shape, rate of those kept), the shape without the batch.
    """

    masks: Sequence[Tensor] | None = None
    wanted: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    used: int = 0

    def apply(self, x: Tensor, shape: Sequence[int], kept: float) -> Tensor:
        """Multiply x (B, ...) by the next mask, which is scaled already."""
        if self.masks is None:
            self.wanted.append((tuple(shape[1:]), kept))
            return x
        self.used += 1
        return x * self.masks[self.used - 1].to(x.dtype)


class GeneratorDropout(nn.Module):
    """Dropout of rate `p` that draws its mask from `generator`.

    `mask_axes` 0 drops single entries, 2 drops whole channels of (B, channels, ...).
    """

    def __init__(self, p: float, generator: torch.Generator, *, mask_axes: int = 0) -> None:
        super().__init__()
        self.p = p
        self.generator = generator
        self.mask_axes = mask_axes
        self.feed: MaskFeed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x with entries dropped in training mode, x itself in evaluation mode."""
        if not self.training or self.p == 0.0:
            return x
        if self.p >= 1.0:
            return x * 0.0
        axes = self.mask_axes or x.dim()
        shape = [size if axis < axes else 1 for axis, size in enumerate(x.shape)]
        if self.feed is not None:
            return self.feed.apply(x, shape, 1.0 - self.p)
        mask = torch.empty(shape, dtype=x.dtype, device=x.device)
        return x * draw_mask(mask, 1.0 - self.p, self.generator)

    def extra_repr(self) -> str:
        """Show the rate when the model is printed."""
        return f"p={self.p}"


def draw_mask(mask: Tensor, kept: float, generator: torch.Generator) -> Tensor:
    """Fill a mask in place: 1 / kept with probability `kept`, else 0."""
    return mask.bernoulli_(kept, generator=generator).div_(kept)


@contextmanager
def feeding(model: nn.Module, feed: MaskFeed) -> Iterator[None]:
    """Let the model's dropout layers ask `feed` instead of their generator."""
    layers = [layer for layer in model.modules() if isinstance(layer, GeneratorDropout)]
    for layer in layers:
        layer.feed = feed
    try:
        yield
    finally:
        for layer in layers:
            layer.feed = None


def seed_dropout(model: nn.Module, generator: torch.Generator) -> None:
    """Make every nn.Dropout, 1d, 2d and 3d of the model draw from `generator`, in place.

    The generator must live on the model's device. A second call hands over to another generator.
    Random calls inside a user's own `forward` cannot be seen from here (`watching_draws`). Raises
    ModelError for another kind of dropout, whose draws could not be repeated.
    """
    for path, parent in list(model.named_modules()):
        if isinstance(parent, GeneratorDropout):
            parent.generator = generator
            continue
        if isinstance(rate := getattr(parent, "dropout", None), float) and rate > 0:
            logger.warning(
                "%s (%s) applies dropout %s inside: its draws are not seeded and two runs may "
                "differ. Set it to 0 and add nn.Dropout where needed.",
                path or "the model", type(parent).__name__, rate,
            )  # fmt: skip
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(parent, name, _seeded(child, generator))


def _seeded(layer: nn.modules.dropout._DropoutNd, generator: torch.Generator) -> nn.Module:
    if type(layer) not in _MASK_AXES:
        raise ModelError(
            f"{type(layer).__name__} draws from torch's global generator and cannot be seeded "
            "per client. Use nn.Dropout, nn.Dropout1d, nn.Dropout2d or nn.Dropout3d."
        )
    seeded = GeneratorDropout(float(layer.p), generator, mask_axes=_MASK_AXES[type(layer)])
    return seeded.train(layer.training)
