"""A look at a few generated parameters, for diagnostics."""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server_app.grouping import members_by_group
from server_app.hypernet import Hypernetwork

SAMPLE = 8
"""Clients and chunks that diagnostics look at."""


@torch.no_grad()
def sample_theta(hypernet: Hypernetwork, client_ids: Sequence[str]) -> Tensor:
    """Generate a few chunks of a few of these clients, one flat vector.

    At most `SAMPLE` clients of a head group and `SAMPLE` chunks, the same at every call.
    """
    samples: list[Tensor] = []
    known = sorted(set(client_ids))
    for key, positions in members_by_group(known, hypernet.group_key).items():
        chosen = [known[i] for i in positions][:SAMPLE]
        least = min(map(hypernet.num_chunks, chosen))
        chunks = torch.unique(torch.linspace(0, max(0, least - 2), SAMPLE).long())
        group = hypernet.groups[key]
        if group.ledger is not None and all(map(group.ledger.holds, chosen)):
            samples.append(group.ledger.sample(chosen, chunks).reshape(-1))
            continue
        rows_NcE = torch.stack([hypernet.embeddings[c].detach()[chunks] for c in chosen])
        heads = chunks % len(group.bias)  # one head for all chunks, or one for each
        features_cNH = hypernet.trunk(rows_NcE).transpose(0, 1)
        samples.append(
            torch.baddbmm(group.bias[heads][:, None], features_cNH, group.weight[heads]).reshape(-1)
        )
    return torch.cat(samples)
