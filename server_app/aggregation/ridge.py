"""The ridge solution of the least-squares rule: which change of a head moves which client.

Shapes: N clients, n of them asked for, c chunks, H hidden size.
"""

# ruff: noqa: N803 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-9
"""Squared, relative: float32 features that differ by less than 3e-5 of their size are equal."""


def ridge_rows(features_cNH: Tensor, rows: Sequence[int], damping: float) -> Tensor:
    """Return the rows asked for of (F F^T + d I)^-1 F, (c, n, H), chunk by chunk; F is centred.

    d is `damping` times the mean squared norm of a centred row, so that it has no unit, and at
    least ROUNDING times that of a row as it came: features that differ by rounding alone are equal,
    and nothing personal can be told apart by them. Solved in float64, in the smaller of the two
    spaces: N x N, or H x H by (F F^T + d I)^-1 F = F (F^T F + d I)^-1. The result is scaled by
    1 + damping, so that clients with orthogonal features get the whole of what is asked.
    """
    wide = features_cNH.double()
    floor_c = ROUNDING * wide.square().sum(2).mean(1) + torch.finfo(torch.float64).tiny
    wide = wide - wide.mean(1, keepdim=True)
    d_c = torch.maximum(damping * wide.square().sum(2).mean(1), floor_c)
    if wide.shape[1] <= wide.shape[2]:
        system, right = wide @ wide.transpose(1, 2), wide
    else:
        system, right = wide.transpose(1, 2) @ wide, wide[:, list(rows)].transpose(1, 2)
    system.diagonal(dim1=1, dim2=2).add_(d_c[:, None])
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(system))
    picked = solved[:, list(rows)] if right is wide else solved.transpose(1, 2)
    return (picked * (1 + damping)).to(features_cNH.dtype)
