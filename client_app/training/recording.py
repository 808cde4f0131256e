"""Training steps that a GPU repeats by itself: recorded once, as a CUDA graph, and replayed.

A small model's step is some hundred kernels, each over before the host has launched the next one.
Recorded, they are launched all at once. What a recording computes with is fixed: addresses, shapes
and every Python number. So a batch is copied to where that of the recording was, numbers that
change from training to training are tensors, and each recipe and batch shape has its own.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from client_app.models.building import DRAWING
from common.log import logger

MOST_SHAPES = 16
"""Batch shapes of a recipe that are recorded; the last batches of many clients differ."""
MOST_RECIPES = 4
"""Recipes of a model that are kept."""
CLOSE = 0.02
"""How far a replay may be from the step itself, as a part of how far that moves each tensor."""

Step = Callable[[Tensor, Tensor], None]
"""Trains on a batch, images (B, ...) and their labels, in place."""
Generators = Sequence[torch.Generator]
Capture = Callable[[Callable[[], None], Generators], Callable[[], None]]
"""Records what a call does with tensors and draws from generators, without doing it; returns what
does it. Raises RuntimeError where that is impossible."""


class GraphCapture:
    """A `Capture` for one model's work on a GPU; its graphs share memory, and run one by one."""

    one = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, run: Callable[[], None], generators: Generators) -> Callable[[], None]:
        """Record `run`; other threads may use the device meanwhile, but not record."""
        graph = torch.cuda.CUDAGraph()
        with self.one, torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # later releases of torch see them by themselves
                for generator in generators:
                    graph.register_generator_state(generator)
            stream, mode = self._stream, "thread_local"
            with torch.cuda.graph(graph, self._pool, stream=stream, capture_error_mode=mode):
                run()
        return graph.replay  # which keeps the graph, for as long as its recording is kept


class Recorder:
    """The recordings of one model's training steps, by recipe."""

    def __init__(self, module: nn.Module, theta: Tensor, capture: Capture) -> None:
        self._module, self._theta, self._capture = module, theta.detach(), capture
        self._recordings: dict[Hashable, Recording] = {}

    def begin(
        self, recipe: Hashable, step: Step, settings: Sequence[Tensor]
    ) -> tuple[Step, Sequence[Tensor]]:
        """Begin a training: return what takes its steps, and the settings that those work with.

        `settings` are the tensors that `step` reads or writes beside the model's own. Of two steps
        with one recipe, the first is kept and given the settings of the second.
        """
        kept = self._recordings.get(recipe)
        if kept is None:
            while len(self._recordings) >= MOST_RECIPES:
                del self._recordings[next(iter(self._recordings))]
            tensors = [self._theta, *settings]
            kept = Recording(step, self._module, tensors, self._capture)
            self._recordings[recipe] = kept
        mine = kept.tensors[1:]
        for tensor, value in zip(mine, settings, strict=True):
            tensor.copy_(value)
        return kept, mine


@dataclass(frozen=True)
class Replay:
    """Recorded work on a batch, and where that batch has to lie."""

    images: Tensor
    labels: Tensor
    again: Callable[[], None]

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Do it with another batch."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.again()


class Recording:
    """One recipe's steps by batch shape: the first of a shape runs, the second is recorded.

    Where a step cannot be recorded, or its replay is not what the step does, none is from there on.
    """

    def __init__(
        self, step: Step, module: nn.Module, tensors: Sequence[Tensor], capture: Capture
    ) -> None:
        self.tensors = tensors
        self._step, self._module, self._capture = step, module, capture
        self._replays: dict[Hashable, Replay] = {}
        self._met: set[Hashable] = set()
        self._why_not = ""

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on a batch, images (B, ...) and their labels."""
        shape = (images.shape, images.stride(), images.dtype, labels.shape, labels.dtype)
        if shape in self._replays:
            self._replays[shape](images, labels)
        elif self._why_not or len(self._replays) == MOST_SHAPES:
            self._step(images, labels)
        elif shape in self._met:
            self._record(shape, images, labels)
        else:
            self._met.add(shape)
            self._meet(images, labels)

    def _meet(self, images: Tensor, labels: Tensor) -> None:
        """Take a step, and see whether it leaves traces that a replay would not."""
        with DRAWING:  # else another thread may seed Python's generator
            before = python_state(self._module)
            self._step(images, labels)
            now = python_state(self._module)
        if now != before:
            self._give_up("its forward pass changes Python values, or draws from Python")

    def _record(self, shape: Hashable, images: Tensor, labels: Tensor) -> None:
        """Take one step, then record it and hold its replay against what the step did."""
        images, labels = images.clone(), labels.clone()
        tensors = [*self.tensors, *self._module.buffers()]
        generators = generators_of(self._module)
        before = Snapshot.of(tensors, generators)
        self._step(images, labels)
        after = Snapshot.of(tensors, generators)
        try:
            before.restore()
            again = self._capture(lambda: self._step(images, labels), generators)
            again()
            if not after.is_close(start=before):
                raise RuntimeError("a replay does not do what the step does")
            self._replays[shape] = Replay(images, labels, again)
        except RuntimeError as error:  # whatever the model does that cannot be recorded
            after.restore()
            self._give_up(f"{error}".partition("\n")[0])

    def _give_up(self, why: str) -> None:
        self._replays.clear()
        self._why_not = why
        name = type(self._module).__name__
        words = "%s: training steps are not recorded as a CUDA graph, which is slower: %s"
        logger.warning(words, name, why)


@dataclass(frozen=True)
class Snapshot:
    """What some tensors and generators held; they may hold something else by now."""

    tensors: Sequence[Tensor]
    held: Sequence[Tensor]
    generators: Generators
    states: Sequence[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], generators: Generators) -> Snapshot:
        """Copy what they hold."""
        held, states = [x.clone() for x in tensors], [g.get_state() for g in generators]
        return cls(tensors, held, generators, states)

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back."""
        for tensor, held in zip(self.tensors, self.held, strict=True):
            tensor.copy_(held)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    def is_close(self, start: Snapshot) -> bool:
        """Whether they hold it now, floats up to `CLOSE` of the way from the start."""
        for now, held, before in zip(self.tensors, self.held, start.held, strict=True):
            if not now.is_floating_point():
                if not torch.equal(now, held):
                    return False
            elif not (now - held).norm() <= CLOSE * (held - before).norm() + 1e-6 * held.norm():
                return False
        return True


def generators_of(module: nn.Module) -> list[torch.Generator]:
    """Return the generators that a module's dropout layers draw from, each once."""
    found = (getattr(layer, "generator", None) for layer in module.modules())
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def python_state(module: nn.Module) -> tuple[object, ...]:
    """Return what of a model no tensor holds, and where its buffers lie: a replay changes none."""
    plain = [
        (name, value)
        for layer in module.modules()
        for name, value in layer.__dict__.items()
        if isinstance(value, bool | int | float | str)
    ]
    return random.getstate(), plain, [buffer.data_ptr() for buffer in module.buffers()]
