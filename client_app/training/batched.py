"""Several clients of one architecture trained as one batched call on one device.

Every client has weights, running statistics, examples and an order of its own; what they share is
the architecture, so one kernel does a step of all of them (torch.func.vmap: convolutions become
grouped, linear layers batched products). The result is that of training them one by one up to
float rounding: a short last batch is padded with examples of weight zero, or, where BatchNorm
would see the padding, taken together only with batches of the same size. Each client's dropout
masks come from its own generator, in the order in which training it alone draws them.

On a GPU the point is how little the host does: no step waits for the device, and cuDNN tries its
kernels for the cohort's shapes once.

Shapes: G clients, B batch, P parameters, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from client_app.data.augment import moved
from client_app.data.examples import ClientData
from client_app.data.losses import Weighted
from client_app.models.building import trainable
from client_app.models.instances import MaskFeed, draw_mask, feeding
from client_app.training.loop import Trained, label_loss, make_optimizer, mixed_precision
from client_app.training.teachers import Teachers
from common.config import TrainingSection
from common.errors import ModelError


@dataclass(frozen=True)
class Member:
    """One client of a cohort: theta (P,), its own buffers, its examples, and who shuffles them.

    `dropout` draws its masks, on theta's device; it is not needed where nothing is dropped.
    """

    theta: Tensor
    buffers: Mapping[str, Tensor]
    data: ClientData
    generator: torch.Generator
    dropout: torch.Generator | None = None


@dataclass(frozen=True)
class Outcome:
    """What a member's training left: theta (P,), buffers; the seconds are its share of them."""

    theta: Tensor
    buffers: dict[str, Tensor]
    trained: Trained


KNOWN = ("torch", "client_app", "tests")
"""Packages whose layers are known to be batchable; a participant's own code may not be."""


def can_train_together(module: nn.Module) -> bool:
    """Whether clients with this architecture can be batched: known layers that share no tensor.

    Where two names stand for one tensor, `functional_call` would leave batched ones behind.
    """
    known = all(type(layer).__module__.split(".")[0] in KNOWN for layer in module.modules())
    kinds = (module.named_parameters, module.named_buffers)
    return known and all(len([*of()]) == len([*of(remove_duplicate=False)]) for of in kinds)


def train_cohort(
    module: nn.Module,
    members: Sequence[Member],
    section: TrainingSection,
    *,
    clip: bool = True,
    teachers: Teachers | None = None,
) -> list[Outcome]:
    """Train every member as `loop.train` would, all of them at once; returns in their order.

    The members' `data` must be on one device and be normalised alike, and either all weigh their
    classes (`losses.Weighted`) or none has a loss of its own; the parameters and buffers of
    `module` are not used. Raises ModelError where it has layers of the participant's own.
    """
    if not can_train_together(module):
        raise ModelError(
            f"{type(module).__name__} cannot be trained for several clients at once: it has "
            "layers of your own, or that share weights. Set batched-clients = 0."
        )
    started = time.monotonic()
    order = sorted(range(len(members)), key=lambda i: -members[i].data.num_train)
    teachers = teachers and teachers.of(order)
    cohort = _Cohort(module, [members[i] for i in order], section, clip, teachers)
    with batched_kernels(members[0].theta.device):
        for _ in range(section.local_epochs):
            cohort.epoch()
    outcomes = dict(zip(order, cohort.outcomes(started), strict=True))
    return [outcomes[i] for i in range(len(members))]


def cut(theta: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Cut theta (G, P) into the module's parameters, each with a leading G."""
    named = trainable(module)
    pieces = torch.split(theta, [p.numel() for p in named.values()], dim=1)
    return {
        name: piece.view(-1, *p.shape)
        for (name, p), piece in zip(named.items(), pieces, strict=True)
    }


def stacked_buffers(module: nn.Module, members: Sequence[Member]) -> dict[str, Tensor]:
    """Return the members' own buffers by name, each with a leading G."""
    names = [name for name, _ in module.named_buffers()]
    return {name: torch.stack([member.buffers[name] for member in members]) for name in names}


@contextmanager
def batched_kernels(device: torch.device) -> Iterator[None]:
    """Choose what suits a batched model on a GPU: cuDNN tries its kernels, attention is unfused.

    A cohort has few shapes and many steps. Fused attention refuses the strides that vmap makes
    ("LSE is not correctly aligned").
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Cohort:
    """Stacked weights, momenta, buffers and examples; members with most examples come first.

    The members that still have a batch at some step are then always the first ones: no gathering.
    """

    def __init__(
        self,
        module: nn.Module,
        members: Sequence[Member],
        section: TrainingSection,
        clip: bool,
        teachers: Teachers | None,
    ) -> None:
        self._module, self._members, self._section, self._clip = module, members, section, clip
        self._teachers = teachers
        self._theta = torch.stack([member.theta for member in members])
        self._optimizer = make_optimizer(self._theta, section)
        self._buffers = stacked_buffers(module, members)
        self._pads = not any(isinstance(m, _BatchNorm) for m in module.modules())
        self._images = torch.cat([member.data.train_images for member in members])
        self._labels = torch.cat([member.data.train_labels for member in members])
        self._counts = [member.data.num_train for member in members]
        self._used = [member.data.num_used(section.batch_size) for member in members]
        self._augments = any(member.data.augmentation for member in members)
        self._loss = torch.zeros(len(members), device=self._theta.device)
        own = [m.data.loss.weights for m in members if isinstance(m.data.loss, Weighted)]
        self._weights = torch.stack(own) if own else None  # (G, C)
        self._wanted = self._wanted_masks()

    @torch.no_grad()
    def _wanted_masks(self) -> list[tuple[tuple[int, ...], float]]:
        """Return what the dropout layers draw in a step, in the order of their calls."""
        feed = MaskFeed()
        buffers = {name: stacked[0].clone() for name, stacked in self._buffers.items()}
        weights = {k: v[0] for k, v in cut(self._theta[:1], self._module).items()}
        with feeding(self._module, feed):
            self._module.train()
            images = self._members[0].data.normalise(self._images[:2])
            functional_call(self._module, (weights, buffers), (images,))
        return feed.wanted

    def _masks(self, group: slice, width: int, sizes: Sequence[int]) -> list[Tensor]:
        """Draw the masks (G, B, ...) of a step; padded examples are dropped altogether."""
        members = self._members[group]
        masks = [
            torch.zeros(len(members), width, *shape, device=self._theta.device)
            for shape, _ in self._wanted
        ]
        for i, (member, size) in enumerate(zip(members, sizes, strict=True)):
            for mask, (_, kept) in zip(masks, self._wanted, strict=True):
                if member.dropout is None:
                    raise ValueError("a member of a cohort with dropout needs a generator for it.")
                draw_mask(mask[i, :size], kept, member.dropout)
        return masks

    def epoch(self) -> None:
        """Take every step of one pass over the examples."""
        self._module.train()
        size = self._section.batch_size
        rows, starts = self._shuffled_rows(), range(0, max(self._used), size)
        sizes = [[min(size, count - first) for count in self._used] for first in starts]
        on_device = torch.tensor(sizes, device=rows.device)  # one transfer for all steps
        for first, step_sizes, counts in zip(starts, sizes, on_device, strict=True):
            active = [count for count in step_sizes if count > 0]
            for group in self._groups(active):
                width = max(active[group])
                batch = rows[:, group, first : first + width]
                self._step(group, batch, counts[group], active[group])

    def _groups(self, sizes: Sequence[int]) -> Iterator[slice]:
        """Cut the active members into runs that can share a step."""
        if self._pads:
            yield slice(0, len(sizes))
            return
        start = 0
        for _, run in groupby(sizes):
            stop = start + len(list(run))
            yield slice(start, stop)
            start = stop

    def _shuffled_rows(self) -> Tensor:
        """Draw each member's epoch as `ClientData.batches` does: rows of `_images` (1, G, most).

        With an augmentation (4, G, most): each picture's moves too, zeros where there are none.
        """
        width = -(-max(self._counts) // self._section.batch_size) * self._section.batch_size
        depth = 4 if self._augments else 1
        table = torch.zeros(depth, len(self._counts), width, dtype=torch.int64)
        offset = 0
        for i, (member, count) in enumerate(zip(self._members, self._counts, strict=True)):
            drawn = member.data.draw_epoch(member.generator).cpu()
            table[: len(drawn), i, :count] = drawn
            table[0, i] += offset  # padding: an example of the member's own
            offset += count
        return table.to(self._theta.device)

    def _step(self, group: slice, batch: Tensor, count: Tensor, sizes: Sequence[int]) -> None:
        """Take one step of the members in `group`, in place; `count` is `sizes`, there.

        `batch` (1 or 4, G, B) is their part of `_shuffled_rows`.
        """
        width = batch.shape[2]
        place = torch.arange(width, device=batch.device)
        share = (place < count[:, None]) / count[:, None]
        theta = self._theta[group].detach().requires_grad_()
        masks = self._masks(group, width, sizes)
        loss = (self._losses(theta, group, batch, masks) * share).sum(dim=1)
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        self._loss[group] += loss.detach() * count
        self._descend(group, gradient)

    def _losses(self, theta: Tensor, group: slice, batch: Tensor, masks: list[Tensor]) -> Tensor:
        """Return the loss of every example (G, B)."""
        rows_GB, moves = batch[0], batch[1:]  # noqa: N806
        pictures = self._images[rows_GB.flatten()]
        if self._augments:
            pictures = moved(pictures, moves.flatten(1))
        images = self._members[0].data.normalise(pictures)
        labels = self._labels[rows_GB].flatten(0, 1)
        buffers = {name: stacked[group] for name, stacked in self._buffers.items()}

        def logits(
            weights: dict[str, Tensor], own: dict[str, Tensor], drops: list[Tensor], batch: Tensor
        ) -> Tensor:
            with feeding(self._module, MaskFeed(drops)):
                found: Tensor = functional_call(self._module, (weights, own), (batch,))
            return found

        stacked_images = images.view(*rows_GB.shape, *images.shape[1:])
        with mixed_precision(self._section, images.device):
            out = vmap(logits)(cut(theta, self._module), buffers, masks, stacked_images).float()
            own = None if self._weights is None else Weighted(self._weights[group])
            losses = label_loss(out.flatten(0, 1), labels, self._section, own, reduction="none")
            losses = losses.view(rows_GB.shape)
            if self._teachers is not None:
                losses = self._teachers.of(group).losses(stacked_images, out, labels, losses)
        return losses

    @torch.no_grad()
    def _descend(self, group: slice, gradient: Tensor) -> None:
        """Clip each member's gradient by its own norm, then take the optimizer's step."""
        s = self._section
        if self._clip:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (s.client_clip_norm / (norms + 1e-6)).clamp(max=1.0)
        self._optimizer.step(gradient, group)

    def outcomes(self, started: float) -> Iterator[Outcome]:
        """Yield what became of each member, in the cohort's order."""
        losses = self._loss.tolist()  # waits for the device: now the training is over
        seconds = (time.monotonic() - started) / len(self._members)
        for i, (count, used) in enumerate(zip(self._counts, self._used, strict=True)):
            yield Outcome(
                theta=self._theta[i].clone(),
                buffers={name: stacked[i].clone() for name, stacked in self._buffers.items()},
                trained=Trained(count, losses[i] / (used * self._section.local_epochs), seconds),
            )


_BatchNorm = nn.modules.batchnorm._BatchNorm
