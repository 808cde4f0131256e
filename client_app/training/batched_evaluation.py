"""Several clients of one architecture tested by batched calls (`cohort.py` trains them).

Shapes: G clients, B batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from client_app.training.batched import Member, cut
from common.messages import Evaluation

TESTED_AT_ONCE = {"cpu": 256, "cuda": 8192}
"""By device type: test examples of all members together in one forward pass."""


@torch.no_grad()
def evaluate_cohort(module: nn.Module, members: Sequence[Member]) -> list[Evaluation]:
    """Test every member as `client_app.training.loop.evaluate` would, all of them at once.

    The members' `theta` and `buffers` are tested; results come from the device in one transfer.
    The seconds are the cohort's, divided by its members.
    """
    started = time.monotonic()
    first = members[0]
    module.eval()
    shapes = {name: p.shape for name, p in module.named_parameters()}
    weights = cut(torch.stack([member.theta for member in members]), shapes)
    names = [name for name, _ in module.named_buffers()]
    buffers = {name: torch.stack([m.buffers[name] for m in members]) for name in names}
    counts = [member.data.num_test for member in members]
    totals = torch.zeros(2, len(members), dtype=torch.float64, device=first.theta.device)
    at_once = TESTED_AT_ONCE.get(first.theta.device.type, 256)
    for images, labels, real in _test_batches(members, max(1, at_once // len(members))):
        logits = _logits(module, weights, buffers, images)
        flat = logits.flatten(0, 1).float()
        losses = functional.cross_entropy(flat, labels.flatten(), reduction="none")
        totals[0] += ((logits.argmax(dim=2) == labels) & real).sum(dim=1)
        totals[1] += (losses.view(real.shape).double() * real).sum(dim=1)
    correct, loss = totals.tolist()
    seconds = (time.monotonic() - started) / len(members)
    return [
        Evaluation(num_test=n, num_correct=int(c), test_loss=value / n, seconds=seconds)
        for n, c, value in zip(counts, correct, loss, strict=True)
    ]


def _test_batches(members: Sequence[Member], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images (G, B, ...), labels (G, B) and which of them (G, B) are not padding."""
    images = torch.cat([member.data.test_images for member in members])
    labels = torch.cat([member.data.test_labels for member in members])
    counts = torch.tensor([member.data.num_test for member in members])
    firsts = counts.cumsum(0) - counts
    places = torch.arange(int(counts.max()))
    real = places < counts[:, None]
    rows = (firsts[:, None] + torch.where(real, places, 0)).to(images.device)
    real = real.to(images.device)
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        batch = members[0].data.normalise(images[part.flatten()])
        yield batch.view(*part.shape, *batch.shape[1:]), labels[part], real[:, start : start + size]


def _logits(
    module: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor
) -> Tensor:
    """Return the logits (G, B, C) of images (G, B, ...), each member's by its own weights."""

    def one(own: dict[str, Tensor], kept: dict[str, Tensor], batch: Tensor) -> Tensor:
        found: Tensor = functional_call(module, (own, kept), (batch,))
        return found

    together: Tensor = vmap(one)(weights, buffers, images)
    return together
