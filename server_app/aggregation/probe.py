"""A look at a few generated parameters, for diagnostics.

Deltas, and how far a step moved theta, are looked at in the same places: a few clients, a few of
their chunks, no padding.

Shapes: n clients, c chunks looked at, S chunk size, H hidden size, E embedding size, k entries
looked at of a client, P its parameters.
"""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server_app.hypernet.groups import members_by_group
from server_app.hypernet.network import Hypernetwork
from server_app.hypernet.pulls import Pull

SAMPLE = 8
"""Clients of a head group, and chunks of a client, that diagnostics look at."""


def theta_moved(
    hypernet: Hypernetwork, pulls: Sequence[Pull], before: Mapping[str, Tensor], rms_delta: float
) -> tuple[float, float]:
    """Compare how far a step moved theta with how far its deltas reach, in the same entries.

    Each delta is held against the change of its client's theta; a client with several of them
    counts as often. A head group weighs by the entries of all its deltas, as in `rms_delta`.

    Parameters
    ----------
    before
        `sample_theta` of the clients of the pulls, from before the step.
    rms_delta
        Of all entries of all deltas.

    Returns
    -------
    (rms_theta_change, effective_rate). The rate is exactly 1 where theta went as far as the deltas
    reach; the change is the rate times `rms_delta`. Without a delta to compare with (all zero in
    the sample, or not finite) the rate is 0 and the change that of the sample.
    """
    after = sample_theta(hypernet, list(before))
    total = torch.zeros(2, dtype=torch.float64, device=hypernet.device)
    groups = members_by_group([pull.client_id for pull in pulls], hypernet.group_key)
    for positions in groups.values():
        group = [pulls[i] for i in positions]
        seen = [pull for pull in group if pull.client_id in before]
        stands_for = _num_entries(group) / _num_entries(seen)
        for pull in seen:
            change_k = after[pull.client_id] - before[pull.client_id]
            delta_k = _sample(pull.delta, hypernet.section.chunk_size)
            squares = [x.double().square().mean().to(total) for x in (change_k, delta_k)]
            total += stands_for * pull.delta.numel() * torch.stack(squares)
    change, delta = (total / _num_entries(pulls)).sqrt().tolist()
    rate = change / delta if 0 < delta < math.inf else 0.0
    return rate * rms_delta if rate else change, rate


@torch.no_grad()
def sample_theta(hypernet: Hypernetwork, client_ids: Sequence[str]) -> dict[str, Tensor]:
    """Generate a few chunks of a few of these clients, (k,) each, the same ones at every call.

    At most `SAMPLE` clients of a head group and `SAMPLE` chunks of each, the first and the last
    among them. What is beyond a client's last parameter is left out.
    """
    sampled: dict[str, Tensor] = {}
    known = sorted(set(client_ids))
    for key, positions in members_by_group(known, hypernet.group_key).items():
        chosen = [known[positions[i]] for i in _spread(len(positions))]
        for count in sorted(set(map(hypernet.num_chunks, chosen))):
            alike = [c for c in chosen if hypernet.num_chunks(c) == count]
            theta_ncS = _generate(hypernet, key, alike, torch.tensor(_spread(count)))
            for client_id, theta_cS in zip(alike, theta_ncS, strict=True):
                padding = count * theta_cS.shape[1] - hypernet.num_parameters(client_id)
                sampled[client_id] = theta_cS.reshape(-1)[: theta_cS.numel() - padding]
    return sampled


def _generate(
    hypernet: Hypernetwork, key: str, client_ids: Sequence[str], chunks: Tensor
) -> Tensor:
    """Generate some chunks of some clients of one head group, (n, c, S)."""
    group = hypernet.groups[key]
    if group.ledger is not None and all(map(group.ledger.holds, client_ids)):
        return group.ledger.sample(client_ids, chunks).transpose(0, 1)
    rows_ncE = torch.stack([hypernet.embeddings[c].detach()[chunks] for c in client_ids])
    heads = chunks % len(group.bias)  # one head for all chunks, or one for each
    features_cnH = hypernet.trunk(rows_ncE).transpose(0, 1)
    theta_cnS = torch.baddbmm(group.bias[heads][:, None], features_cnH, group.weight[heads])
    return theta_cnS.transpose(0, 1)


def _sample(delta: Tensor, chunk_size: int) -> Tensor:
    """Return those entries (k,) of a delta (P,) that `sample_theta` has of theta."""
    chunks = torch.split(delta, chunk_size)
    return torch.cat([chunks[i] for i in _spread(len(chunks))])


def _spread(count: int) -> list[int]:
    """Spread at most `SAMPLE` of `count` positions evenly from the first to the last.

    >>> _spread(79), _spread(3)
    ([0, 11, 22, 33, 44, 55, 66, 78], [0, 1, 2])
    """
    return sorted({i * (count - 1) // (SAMPLE - 1) for i in range(SAMPLE)})


def _num_entries(pulls: Sequence[Pull]) -> int:
    return sum(pull.delta.numel() for pull in pulls)
