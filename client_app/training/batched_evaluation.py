"""What several clients' models of one architecture say of examples, by batched calls.

Shapes: G clients, B batch, N examples of a client, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from client_app.training.batched import Member, batched_kernels, cut, stacked_buffers

TESTED_AT_ONCE = {"cpu": 256, "cuda": 8192}
"""By device type: examples of all members of a cohort together in one forward pass."""


@torch.no_grad()
def cohort_logits(
    module: nn.Module, members: Sequence[Member], *, validation: bool = False
) -> list[Tensor]:
    """Return every member's logits (N, C) of its test or validation examples, as `logits_over`."""
    module.eval()
    theta = torch.stack([member.theta for member in members])
    weights, buffers = cut(theta, module), stacked_buffers(module, members)
    examples = [m.data.validation_images if validation else m.data.test_images for m in members]

    def logits(own: dict[str, Tensor], kept: dict[str, Tensor], batch: Tensor) -> Tensor:
        found: Tensor = functional_call(module, (own, kept), (batch,))
        return found

    at_once = max(1, TESTED_AT_ONCE.get(theta.device.type, 256) // len(members))
    together, rows = torch.cat(examples), _rows(examples).to(theta.device)
    found = [theta.new_empty(len(members), 0, members[0].data.num_classes)]
    with batched_kernels(theta.device):
        for start in range(0, rows.shape[1], at_once):
            part = rows[:, start : start + at_once]
            batch = members[0].data.normalise(together[part.flatten()])
            found.append(vmap(logits)(weights, buffers, batch.view(*part.shape, *batch.shape[1:])))
    by_member = torch.cat(found, dim=1)
    return [out[: len(own)] for out, own in zip(by_member, examples, strict=True)]


def _rows(examples: Sequence[Tensor]) -> Tensor:
    """Return where each member's examples are among all (G, most); others fill up a short one."""
    counts = torch.tensor([len(own) for own in examples])
    firsts = counts.cumsum(0) - counts
    rows = firsts[:, None] + torch.arange(int(counts.max()))
    return rows.clamp(max=int(counts.sum()) - 1)
