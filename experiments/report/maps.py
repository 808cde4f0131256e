"""Maps of the learned embeddings, coloured by architecture and by what labels clients share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from common.errors import MHpFedHNError
from experiments.report.embeddings import (
    Array,
    alignment,
    label_shares,
    learned,
    load_embeddings,
    ordering,
    overlap,
    principal_axes,
    rank_correlation,
)
from experiments.report.figures import DARK_INK, PAPER, WHITE, draw_map, inline_svg
from experiments.report.groups import Study
from experiments.report.looks import family_looks
from experiments.report.runs import Run, client_order
from server_app.output.figures import MUTED

HEIGHT_IN = 4.8
LINKS_PER_CLIENT = 2
FEWEST_PAIRS = 6
SMALLEST = 3
"""Fewer clients make no map."""
BRIGHT = 0.55
"""From here on the scale's colours want dark writing."""
SCALE = [to_hex(colormaps["cividis"](i / 6)) for i in range(7)]
"""From little to much, told apart by lightness alone."""


@dataclass(frozen=True)
class EmbeddingMap:
    """One run's map as SVG, drawn twice; `by_labels` is empty, and `why` says why, without data.

    `families` is {architecture: index of its colour}.
    """

    title: str
    by_family: str
    families: Mapping[str, int]
    findings: tuple[str, ...]
    by_labels: str = ""
    why: str = ""


def embedding_maps(study: Study, *, limit: int) -> tuple[list[EmbeddingMap], list[str]]:
    """Draw the map of each group's first completed run that has embeddings, at most `limit`.

    Returns the maps, and the names of the groups that have none for lack of room.
    """
    maps: list[EmbeddingMap] = []
    passed_over: list[str] = []
    for group in study.groups:
        for run in group.counted:
            moved = learned(load_embeddings(run.folder), run.config)
            if len(moved) < SMALLEST:
                continue
            if len(maps) < limit:
                maps.append(_map_of(run, f"{group.label}, seed {run.seed}", moved))
            else:
                passed_over.append(group.label)
            break
    return maps, passed_over


def _map_of(run: Run, title: str, moved: Mapping[str, Array]) -> EmbeddingMap:
    names = sorted(moved, key=client_order)
    cosines = alignment(moved, names)
    places, shares = principal_axes(cosines)

    def drawn(colouring: str, links: Mapping[tuple[int, int], float], **looks: list[str]) -> str:
        def draw(axes: Axes) -> None:
            for pair, weight in links.items():
                x, y = places[[*pair]].T
                axes.plot(x, y, color=MUTED, alpha=0.15 + 0.75 * weight, linewidth=1.2)
            draw_map(axes, places, names, **looks)
            axes.set_xlabel(f"component 1 ({100 * shares[0]:.0f} % of the variance)", color=MUTED)
            axes.set_ylabel(f"component 2 ({100 * shares[1]:.0f} %)", color=MUTED)

        return inline_svg(draw, height_in=HEIGHT_IN, title=f"Embeddings of {title}, {colouring}")

    known = run.families()
    families = [known.get(name, "unknown") for name in names]
    looks = family_looks(families)
    by_family = drawn(
        "by architecture", {}, colours=[looks[family].light for family in families],
        tips=families, marks=[PAPER] * len(names),
    )  # fmt: skip
    legend = {family: look.colour for family, look in looks.items()}
    findings = _of_families(cosines, np.array(families))
    try:
        overlaps = overlap(label_shares(run, names))
    except MHpFedHNError as error:
        return EmbeddingMap(title, by_family, legend, tuple(findings), why=str(error))
    findings += _of_labels(cosines, overlaps, np.array([len(moved[name]) for name in names]))
    order, closest = ordering(overlaps).tolist(), np.argsort(-overlaps, kind="stable").tolist()
    near = [[j for j in row if j != i][:LINKS_PER_CLIENT] for i, row in enumerate(closest)]
    said = [", ".join(f"{names[j]} ({100 * overlaps[i, j]:.0f} %)" for j in others)
            for i, others in enumerate(near)]  # fmt: skip
    pairs = {(min(i, j), max(i, j)) for i, others in enumerate(near) for j in others}
    by_labels = drawn(
        "by label overlap", {p: float(overlaps[p]) for p in sorted(pairs) if overlaps[p] > 0},
        colours=[to_hex(colormaps["cividis"](share)) for share in order],
        tips=[f"labels overlap most with clients {others}" for others in said],
        marks=[DARK_INK if share > BRIGHT else WHITE for share in order],
    )  # fmt: skip
    return EmbeddingMap(title, by_family, legend, tuple(findings), by_labels)


def _of_families(cosines: Array, families: NDArray[np.str_]) -> list[str]:
    upper = np.triu_indices(len(cosines), 1)
    same = families[upper[0]] == families[upper[1]]
    if same.all() or not same.any():
        return []
    alike, other = cosines[upper][same].mean(), cosines[upper][~same].mean()
    return [
        f"Mean cosine of two clients' directions: {alike:+.2f} with the same architecture, "
        f"{other:+.2f} with different ones."
    ]


def _of_labels(cosines: Array, overlaps: Array, sizes: NDArray[np.int_]) -> list[str]:
    """Correlate directions with labels, apart for pairs that share heads and pairs that do not."""
    upper = np.triu_indices(len(cosines), 1)
    equal = sizes[upper[0]] == sizes[upper[1]]
    parts = []
    for mask, which in ((equal, "of equal size, which share heads"), (~equal, "of different size")):
        if (count := int(mask.sum())) < FEWEST_PAIRS:
            continue
        found = rank_correlation(cosines[upper][mask], overlaps[upper][mask])
        if found is not None:
            parts.append(f"{found:+.2f} over the {count} pairs {which}")
    return [f"Rank correlation of direction and label overlap: {'; '.join(parts)}."] * bool(parts)
