"""Maps of the learned embeddings, coloured by architecture and by what labels clients share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import MHpFedHNError
from experiments.report.charts import MapAxes, MapPoint, map_chart
from experiments.report.embeddings import (
    alignment,
    in_order,
    learned,
    load_embeddings,
    principal_axes,
)
from experiments.report.groups import Member, Study
from experiments.report.labels import label_shares, ordering, overlap, rank_correlation
from experiments.report.looks import family_looks, scale_colour

Array = NDArray[np.float64]

LINKS_PER_CLIENT = 2
FEWEST_PAIRS = 6
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
            moved = learned(load_embeddings(member.run.folder), member.run.config)
            if len(moved) < SMALLEST:
                continue
            if len(maps) < limit:
                maps.append(_draw(member, f"{group.label}, seed {member.seed}", moved))
            else:
                passed_over.append(group.label)
            break
    return maps, passed_over


def _draw(member: Member, title: str, moved: dict[str, Array]) -> EmbeddingMap:
    names = in_order(moved)
    sizes = [len(moved[name]) for name in names]
    cosines = alignment(moved, names)
    places, shares = principal_axes(cosines)
    known = member.run.families()
    families = [known.get(name, "unknown") for name in names]
    looks = family_looks(families)
    dots = [
        MapPoint(x, y, looks[family].colour, name, f"client {name}: {family}")
        for (x, y), name, family in zip(places.tolist(), names, families, strict=True)
    ]
    axes = MapAxes(f"Embeddings of {title}, by architecture", shares)
    by_family = map_chart(dots, axes)
    findings = _by_family(cosines, families)
    legend = tuple((family, look.colour) for family, look in looks.items())
    try:
        overlaps = overlap(label_shares(member.run, names))
    except MHpFedHNError as error:
        return EmbeddingMap(title, by_family, legend, "", str(error), tuple(findings))
    findings += _by_labels(cosines, overlaps, sizes)
    by_labels = _label_map(places, names, overlaps, MapAxes(title, shares))
    return EmbeddingMap(title, by_family, legend, by_labels, "", tuple(findings))


def _label_map(
    places: Array,
    names: Sequence[str],
    overlaps: Array,
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


def _links(overlaps: Array) -> list[tuple[int, int, float]]:
    """Return the pairs that are among each other's closest in labels, with their overlap."""
    count = len(overlaps)
    found = {}
    for i in range(count):
        others = [int(j) for j in np.argsort(-overlaps[i], kind="stable") if j != i]
        for j in others[:LINKS_PER_CLIENT]:
            if overlaps[i, j] > 0:
                found[min(i, j), max(i, j)] = float(overlaps[i, j])
    return [(i, j, weight) for (i, j), weight in sorted(found.items())]


def _by_family(cosines: Array, families: Sequence[str]) -> list[str]:
    upper = np.triu_indices(len(cosines), 1)
    kinds = np.array(families)
    same = kinds[upper[0]] == kinds[upper[1]]
    if same.all() or not same.any():
        return []
    alike, other = cosines[upper][same].mean(), cosines[upper][~same].mean()
    return [
        f"Mean cosine of two clients' directions: {alike:+.2f} with the same architecture, "
        f"{other:+.2f} with different ones."
    ]


def _by_labels(cosines: Array, overlaps: Array, sizes: Sequence[int]) -> list[str]:
    """Correlate directions with labels, apart for pairs that share heads and pairs that do not."""
    upper = np.triu_indices(len(cosines), 1)
    counts = np.array(sizes)
    equal = counts[upper[0]] == counts[upper[1]]
    parts = []
    for mask, which in ((equal, "of equal size, which share heads"), (~equal, "of different size")):
        count = int(mask.sum())
        if count < FEWEST_PAIRS:
            continue
        found = rank_correlation(cosines[upper][mask], overlaps[upper][mask])
        if found is not None:
            parts.append(f"{found:+.2f} over the {count} pairs {which}")
    if not parts:
        return []
    return [f"Rank correlation of direction and label overlap: {'; '.join(parts)}."]
