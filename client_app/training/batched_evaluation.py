"""Testing several clients of one architecture by batched calls.

Shapes: G clients, B batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from client_app.training.batched import Member, cut, stacked_buffers
from common.messages import Evaluation

TESTED_AT_ONCE = {"cpu": 256, "cuda": 8192}
"""By device type: test examples of all members of a cohort together in one forward pass."""


@torch.no_grad()
def evaluate_cohort(module: nn.Module, members: Sequence[Member]) -> list[Evaluation]:
    """Test every member's `theta` and `buffers` as `evaluate` would, all of them at once.

    Results come from the device in one transfer. The seconds are the cohort's, divided by its
    members.
    """
    started = time.monotonic()
    device = members[0].theta.device
    module.eval()
    weights = cut(torch.stack([member.theta for member in members]), module)
    buffers = stacked_buffers(module, members)
    totals = torch.zeros(2, len(members), dtype=torch.float64, device=device)

    def logits(own: dict[str, Tensor], kept: dict[str, Tensor], batch: Tensor) -> Tensor:
        found: Tensor = functional_call(module, (own, kept), (batch,))
        return found

    at_once = max(1, TESTED_AT_ONCE.get(device.type, 256) // len(members))
    for images, labels, real in _test_batches(members, at_once):
        out: Tensor = vmap(logits)(weights, buffers, images)
        flat = out.flatten(0, 1).float()
        losses = functional.cross_entropy(flat, labels.flatten(), reduction="none")
        totals[0] += ((out.argmax(dim=2) == labels) & real).sum(dim=1)
        totals[1] += (losses.view(real.shape).double() * real).sum(dim=1)
    correct, loss = totals.tolist()  # waits for the device
    seconds = (time.monotonic() - started) / len(members)
    return [
        Evaluation(member.data.num_test, int(hits), total / member.data.num_test, seconds)
        for member, hits, total in zip(members, correct, loss, strict=True)
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
