"""Maps of the learned embeddings, coloured by architecture and by what labels clients share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import MHpFedHNError
from experiments.study.charts import MapAxes, MapPoint, map_chart
from experiments.study.embeddings import client_points, load_embeddings, principal_axes
from experiments.study.groups import Member, Study
from experiments.study.labels import label_shares, ordering, overlap, rank_correlation
from experiments.study.looks import family_looks, scale_colour

LINKS_PER_CLIENT = 2
SMALLEST = 3
"""Fewer clients make no map."""


@dataclass(frozen=True)
class EmbeddingMap:
    """One run's map, drawn twice; `by_labels` is empty, and `why` says why, without the data."""

    title: str
    by_family: str
    families: tuple[tuple[str, int], ...]
    by_labels: str
    why: str
    findings: tuple[str, ...]


def embedding_maps(study: Study, *, limit: int) -> tuple[list[EmbeddingMap], list[str]]:
    """Draw the map of each group's first completed run that has embeddings.

    Returns
    -------
    At most `limit` maps, and the names of the groups that have none for lack of room.
    """
    maps: list[EmbeddingMap] = []
    passed_over: list[str] = []
    for group in study.groups:
        for member in group.counted:
            embeddings = load_embeddings(member.run.folder)
            if len(embeddings) < SMALLEST:
                continue
            if len(maps) < limit:
                maps.append(_draw(member, f"{group.label}, seed {member.seed}", embeddings))
            else:
                passed_over.append(group.label)
            break
    return maps, passed_over


def _draw(member: Member, title: str, embeddings: dict[str, NDArray[np.float64]]) -> EmbeddingMap:
    names, points = client_points(embeddings)
    places, shares = principal_axes(points)
    known = member.run.families()
    families = [known.get(name, "unknown") for name in names]
    looks = family_looks(families)
    dots = [
        MapPoint(x, y, looks[family].colour, name, f"client {name}: {family}")
        for (x, y), name, family in zip(places.tolist(), names, families, strict=True)
    ]
    axes = MapAxes(f"Embeddings of {title}, by architecture", shares)
    by_family = map_chart(dots, axes)
    findings = _apart_by_family(points, families)
    legend = tuple((family, look.colour) for family, look in looks.items())
    try:
        overlaps = overlap(label_shares(member.run, names))
    except MHpFedHNError as error:
        return EmbeddingMap(title, by_family, legend, "", str(error), tuple(findings))
    findings += _apart_by_labels(points, overlaps)
    by_labels = _label_map(places, names, overlaps, MapAxes(title, shares))
    return EmbeddingMap(title, by_family, legend, by_labels, "", tuple(findings))


def _label_map(
    places: NDArray[np.float64],
    names: Sequence[str],
    overlaps: NDArray[np.float64],
    axes: MapAxes,
) -> str:
    order = ordering(overlaps)
    dots = []
    for i, name in enumerate(names):
        others = [j for j in np.argsort(-overlaps[i], kind="stable") if j != i][:LINKS_PER_CLIENT]
        near = ", ".join(f"{names[j]} ({100 * overlaps[i, j]:.0f} %)" for j in others)
        colour = scale_colour(float(order[i]))
        tip = f"client {name}: labels overlap most with clients {near}"
        x, y = places[i].tolist()
        dots.append(MapPoint(x, y, colour, name, tip, light=bool(order[i] > 0.55)))
    title = f"Embeddings of {axes.title}, by label overlap"
    return map_chart(dots, MapAxes(title, axes.shares), links=_links(overlaps))


def _links(overlaps: NDArray[np.float64]) -> list[tuple[int, int, float]]:
    """Return the pairs that are among each other's closest in labels, with their overlap."""
    count = len(overlaps)
    found = {}
    for i in range(count):
        others = [int(j) for j in np.argsort(-overlaps[i], kind="stable") if j != i]
        for j in others[:LINKS_PER_CLIENT]:
            if overlaps[i, j] > 0:
                found[min(i, j), max(i, j)] = float(overlaps[i, j])
    return [(i, j, weight) for (i, j), weight in sorted(found.items())]


def _distances(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance of every two clients in the full space (clients, clients)."""
    apart: NDArray[np.float64] = np.linalg.norm(points[:, None] - points[None, :], axis=2)
    return apart


def _apart_by_family(points: NDArray[np.float64], families: Sequence[str]) -> list[str]:
    distances, upper = _distances(points), np.triu_indices(len(points), 1)
    same = np.array([families[i] == families[j] for i, j in zip(*upper, strict=True)])
    if same.all() or not same.any():
        return []
    ratio = distances[upper][same].mean() / distances[upper][~same].mean()
    return [
        f"Two clients of one architecture are {ratio:.2f} times as far apart as two of different "
        "ones (mean distance of embeddings, all dimensions)."
    ]


def _apart_by_labels(points: NDArray[np.float64], overlaps: NDArray[np.float64]) -> list[str]:
    upper = np.triu_indices(len(points), 1)
    found = rank_correlation(_distances(points)[upper], overlaps[upper])
    if found is None:
        return ["All pairs of clients overlap equally in their labels."]
    meaning = (
        "the more labels in common, the nearer"
        if found < 0
        else "sharing labels does not bring them nearer"
    )
    return [
        f"Rank correlation of distance and label overlap over all pairs: {found:+.2f} "
        f"({meaning if abs(found) >= 0.1 else 'next to none'})."
    ]
