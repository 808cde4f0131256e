"""What goes into a gradient of the hypernetwork, and what is known about it afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server_app.hypernet.heads import HeadPullback


@dataclass(frozen=True)
class Pull:
    """One client's part of a gradient: its delta (P_i,) and its share of the step."""

    client_id: str
    delta: Tensor
    share: float = 1.0


@dataclass(frozen=True)
class Pullback:
    """Parameters whose `grad` was written by `Hypernetwork.backward`, and facts about the deltas.

    Attributes
    ----------
    shared : the trunk and the heads of the groups that took part.
    embeddings : the embeddings of the clients that took part.
    rms_delta : root mean square over all entries of all deltas.
    norm : global 2-norm of all these gradients.
    coherence : |mean delta|^2 / mean |delta_i|^2, pooled over head groups; 1 when all agree
        (or there is one), 1/N when they are unrelated.
    """

    shared: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    norm: float
    rms_delta: float
    coherence: float


def check_pulls(pulls: Sequence[Pull], sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless there are pulls, of their clients' sizes and with positive shares."""
    if not pulls:
        raise ValueError("a gradient needs at least one delta; got none.")
    for pull in pulls:
        shape, expected = tuple(pull.delta.shape), (sizes[pull.client_id],)
        if shape != expected:
            raise ValueError(
                f"delta of client {pull.client_id!r} has shape {shape}; its theta has {expected}."
            )
        if not 0 < pull.share < math.inf:
            raise ValueError(
                f"the share of client {pull.client_id!r} is {pull.share}; it must be positive and "
                "finite. Leave a client out instead of giving it nothing."
            )


def delta_facts(pulls: Sequence[Pull], pulled: Sequence[HeadPullback]) -> tuple[float, float]:
    """Return (rms_delta, coherence) of a step; see `Pullback`."""
    total = sum(float(part.square_norms.sum()) for part in pulled)
    agreed = sum(len(part.square_norms) * float(part.mean_square_norm) for part in pulled)
    entries = sum(pull.delta.numel() for pull in pulls)
    return math.sqrt(total / entries), agreed / total if total > 0 else 1.0


def global_norm(parameters: Sequence[nn.Parameter]) -> float:
    """Return the 2-norm over the gradients of all parameters, each read once.

    Chunk by chunk, then over chunks in float64: one float32 sum over 31 million entries is wrong
    in the third digit.
    """
    norms: list[Tensor] = []
    for gradient in (parameter.grad for parameter in parameters):
        if gradient is not None:
            rest = tuple(range(1, gradient.dim())) if gradient.dim() > 2 else None
            norms.append(torch.linalg.vector_norm(gradient, dim=rest).reshape(-1))
    return float(torch.linalg.vector_norm(torch.cat(norms).double()))


def step_norm(pulled: Sequence[HeadPullback], others: Sequence[nn.Parameter]) -> float:
    """Return the 2-norm over the heads' gradients, measured while made, and all others'."""
    heads = sum(float(part.square_norm) for part in pulled)
    return math.hypot(math.sqrt(heads), global_norm(others))
