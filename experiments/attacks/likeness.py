"""Who is like whom: what the embeddings and the kernel that the server keeps tell of the labels."""

from __future__ import annotations

import argparse
from itertools import combinations
from typing import Any

import torch
from torch.nn import functional

from experiments.attacks.federation import Federation, histogram

OF_COMMON = "__global__"


def attack(federation: Federation, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return by group how the cosine of two embeddings goes with that of the label frequencies.

    `correlation` is Pearson's, over all pairs of clients; NaN where no embedding has moved.
    """
    network = federation.server.hypernet
    truth = {c: histogram(federation.participant(c).data) for c in federation.clients()}
    rows = []
    for key in network.groups:
        members = [m for m in network.members(key) if m.rpartition("/")[2] in truth]
        pairs = [*combinations(members, 2)]
        if len(pairs) < 3:
            continue
        cosines = torch.tensor(
            [
                [_cosine(network.embeddings[a], network.embeddings[b]),
                 _cosine(truth[a.rpartition("/")[2]], truth[b.rpartition("/")[2]])]
                for a, b in pairs
            ],
            dtype=torch.float64,
        )  # fmt: skip
        moved = bool(cosines[:, 0].std() > 0)
        correlation = float(torch.corrcoef(cosines.T)[0, 1]) if moved else float("nan")
        rows.append(
            {
                "group": "common models" if OF_COMMON in key else f"own models, {key} chunks",
                "clients": len(members),
                "correlation": correlation,
                "mean_likeness": float(cosines[:, 0].mean()),
            }
        )
    return rows


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(functional.cosine_similarity(a.double(), b.double(), dim=0))
