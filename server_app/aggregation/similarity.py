"""Splits head groups by what the embeddings have learned (`head-sharing = "similarity"`).

An answer to the paper's open question 3: clients of one size may have models of different kinds,
which the server must not know. It sees in which direction training moved each embedding away from
its random start, and lets clients share heads as long as they moved alike.

Honest limits: a chunk's features are compared, not its parameters, so clients with different
labels are told apart as well; what was learned in the shared heads until then is copied, not
undone; and nothing moves a client between groups later. It happens once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.log import logger
from server_app.hypernet.groups import group_order
from server_app.hypernet.network import Hypernetwork

Array = NDArray[np.float64]
ROUNDING = 1e-12


def split_groups(hypernet: Hypernetwork, least: float) -> dict[str, list[list[str]]]:
    """Split every head group of more than one client; mutates the hypernetwork.

    Parameters
    ----------
    least : clusters stay together while their mean cosine is at least this, -1 to 1.

    Returns
    -------
    The parts of each group that was split, by its key; the first part keeps the old heads.
    """
    found: dict[str, list[list[str]]] = {}
    for key in sorted(hypernet.groups, key=group_order):
        members = hypernet.bank.members(key)
        if len(members) < 2:
            continue
        found_parts = clusters(_cosines(hypernet, members), least)
        parts = [[members[i] for i in part] for part in found_parts]
        if len(parts) > 1:
            found[key] = parts
            hypernet.bank.split(key, parts)
            logger.info("Heads of group %s: %d clients split into %s", key, len(members), parts)
    return found


def clusters(cosines: Array, least: float) -> list[list[int]]:
    """Merge the two most similar clusters while their mean cosine is at least `least`.

    Average linkage: the similarity of two clusters is the mean over their pairs (N, N), N >= 1.

    Returns
    -------
    Positions of each cluster, ascending; large clusters first, then by their first member.
    """
    from sklearn.cluster import AgglomerativeClustering  # imports scipy: a second

    if len(cosines) == 1:
        return [[0]]
    linkage = AgglomerativeClustering(
        n_clusters=None,
        metric="precomputed",
        linkage="average",
        distance_threshold=1 - least + ROUNDING,  # it merges below its threshold
    )
    labels = linkage.fit_predict(1 - cosines)
    parts = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return sorted(parts, key=lambda part: (-len(part), part[0]))


def _cosines(hypernet: Hypernetwork, members: Sequence[str]) -> Array:
    """Return the cosines (N, N) between the ways the members' embeddings have gone; 0 for none."""
    moved = np.stack([hypernet.movement(c).double().cpu().numpy().ravel() for c in members])
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    unit = np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 0)
    cosines: Array = unit @ unit.T
    return cosines
