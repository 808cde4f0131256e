"""Head groups: which clients share, and what they send: updates, clipped, and deltas by group.

Shapes: n deltas, P parameters of a client (the paper's K_i).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from common.config import HypernetSection
from common.log import logger

TILE_BYTES = 16 * 2**20  # of gathered vectors: half of a common L3 cache
GPU_FACTOR = 64  # a GPU wants few launches more than a small footprint
HUGE_BYTES = 4 * 2**20  # blocks from here on are put on huge pages
ROW_PADDING = 16  # floats; rows a multiple of 4 KiB apart would fall into the same cache sets
LEAST = 3
"""Clients whose norms have to be known of a head group: of two that differ nobody can say which is
usual."""
PAIR = 2.0
"""Times `factor` that a delta may be longer than the other's, of two: their data differ in size."""


def num_chunks(num_parameters: int, chunk_size: int) -> int:
    """Return tau_i = ceil(K_i / S), the chunks that hold `num_parameters` scalars."""
    return -(-num_parameters // chunk_size)


def head_group(
    section: HypernetSection, client_id: str, chunks: int, tag: str = ""
) -> tuple[str, int]:
    """Return the key of a client's head group and the number of heads of that group.

    `head-sharing` decides, and nothing but counts and a declared tag is known of a client:

    - "chunks": equally many chunks, as published (docs/method.md, "Hypernetwork"); key "79".
    - "tolerance": size classes, fixed in advance so that nothing depends on who comes first; the
      largest has at most `sharing-tolerance` more chunks than the smallest; key "92".
    - "tag": equally many chunks and an equal tag; key "79-1f0c...".
    - "own": nobody shares; key "79-<client_id>".

    Differs from paper: all but "chunks" (its appendix C.5 compares separate heads).

    >>> head_group(HypernetSection(head_sharing="tolerance"), "site-a", 79)
    ('92', 92)
    """
    heads, suffix = chunks, ""
    match section.head_sharing:
        case "tolerance":  # classes 1, 2, 3, ...: each starts one above the largest of the last
            heads = 1
            while heads < chunks:
                heads = max(heads + 1, int((heads + 1) * (1 + section.sharing_tolerance)))
        case "tag":
            suffix = f"-{tag}"
        case "own":
            suffix = f"-{client_id}"
    return f"{heads}{suffix}", heads


def group_order(key: str) -> tuple[int, str]:
    """Sort key of head groups: by size, then by name."""
    count, _, rest = key.partition("-")
    return int(count), rest


def members_by_group(
    client_ids: Iterable[str], key_of: Callable[[str], str]
) -> dict[str, Sequence[int]]:
    """Return the positions of the clients of each head group.

    Groups come in the order of `group_order`, positions in the order given, so that nothing
    depends on the order in which sizes were first seen.

    >>> members_by_group(["b", "a", "c"], {"a": "2", "b": "19", "c": "2"}.__getitem__)
    {'2': [1, 2], '19': [0]}
    """
    positions: dict[str, list[int]] = {}
    for position, client_id in enumerate(client_ids):
        positions.setdefault(key_of(client_id), []).append(position)
    return {key: positions[key] for key in sorted(positions, key=group_order)}


@dataclass(frozen=True)
class Update:
    """What one reply brings: delta (P_i,), float32; weights are relative within a step.

    `staleness` counts the server steps between the dispatch and the arrival.
    """

    client_id: str
    delta: Tensor
    weight: float = 1.0
    staleness: int = 0


class NormClip:
    """Scales down deltas that are far larger than their group's usually are (docs/parallel.md).

    A delta may have `factor` times (0: any) the median of the newest norms of the clients of its
    head group, those of this step included: large models have large deltas. While fewer than half
    of them lie, the median is between two honest norms. As long as only two norms are known, the
    smaller takes its place (where no third is expected `PAIR` times it), and a single one does not
    count at all: nobody else would undo later what a lie moves now. Who is alone in its group, and
    shares with nobody, is not clipped.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._norms: dict[str, dict[str, float]] = {}

    def clip_all(
        self,
        updates: Sequence[Update],
        group_of: Callable[[str], str],
        size_of: Callable[[str, Collection[str]], int] = lambda *_: LEAST,
    ) -> list[Update]:
        """Return the updates, deltas (P_i,) of at most `factor` times their group's median norm.

        `size_of` says how many clients share in a group, if some send; where nobody does, each has
        what it sent to itself, and nothing is clipped. The updates come back sorted by client, and
        do not depend on the order in which replies arrived.
        """
        if not self._factor:
            return list(updates)
        ordered = sorted(updates, key=lambda u: (u.client_id, u.staleness))
        norms = [float(torch.linalg.vector_norm(u.delta.double())) for u in ordered]
        clipped = dict(enumerate(ordered))
        for key, positions in members_by_group((u.client_id for u in ordered), group_of).items():
            if not (size := size_of(key, [ordered[i].client_id for i in positions])):
                continue
            known = self._norms.setdefault(key, {})
            known.update((ordered[i].client_id, norms[i]) for i in positions)
            bound = self._bound(key, size)
            clipped |= {i: _scaled(ordered[i], norms[i], bound) for i in positions}
        return [*clipped.values()]

    def _bound(self, key: str, size: int) -> float:
        """Return how long a delta may be in a group of so many that share."""
        known = self._norms[key].values()
        if len(known) >= LEAST:
            return self._factor * median(known)
        if size == 1:
            return math.inf
        factor = self._factor * (PAIR if size < LEAST else 1.0)
        return factor * min(known) if len(known) > 1 else 0.0

    def forget(self, client_id: str) -> None:
        """Forget what a client's norms were."""
        for norms in self._norms.values():
            norms.pop(client_id, None)
        self._norms = {key: norms for key, norms in self._norms.items() if norms}

    def export(self) -> dict[str, dict[str, float]]:
        """Return the remembered norms for a checkpoint."""
        return {group: dict(norms) for group, norms in self._norms.items()}

    def restore(self, saved: Mapping[str, Mapping[str, float]]) -> None:
        """Load exported norms."""
        self._norms = {group: dict(norms) for group, norms in saved.items()}


def _scaled(update: Update, norm: float, bound: float) -> Update:
    """Return an update whose delta, of this norm, is no longer than the bound."""
    if norm <= bound:
        return update
    text = "Delta of client %s has norm %.3g; scaled down to %.3g (clip-to-median)"
    logger.debug(text, update.client_id, norm, bound)
    return replace(update, delta=update.delta * (bound / norm))


@dataclass(frozen=True)
class GroupDeltas:
    """The deltas of one step that belong to one head group.

    Attributes
    ----------
    width : entries of the group's longest theta, the chunks of its heads whole.
    client_ids : who sent them; one may appear twice (two of its replies in one step).
    deltas : (P_i,) each, on the hypernetwork's device.
    shares : (n,) float32, positive; the shares of the whole step.
    """

    key: str
    width: int
    client_ids: Sequence[str]
    deltas: Sequence[Tensor]
    shares: Tensor

    @cached_property
    def square_norms(self) -> list[float]:
        """|delta_i|^2 of each; not finite where an entry is not, or a norm is beyond float32."""
        squares: list[float] = torch.stack([square_norm(delta) for delta in self.deltas]).tolist()
        return squares

    @cached_property
    def within(self) -> list[float]:
        """The shares of the deltas within the group; they sum to 1."""
        found: list[float] = (self.shares / self.shares.sum()).tolist()
        return found

    @property
    def mean_square(self) -> float:
        """|mean delta|^2."""
        return float(square_norm(self.mean))

    @cached_property
    def mean(self) -> Tensor:
        """Their mean by shares (width,), each padded with zeros."""
        mean = torch.zeros(self.width, device=self.shares.device)
        for delta, weight in zip(self.deltas, self.within, strict=True):
            mean[: len(delta)].add_(delta, alpha=weight)
        return mean


def rms_and_coherence(parts: Sequence[GroupDeltas]) -> tuple[float, float]:
    """Return `rms_delta` and `coherence` (`StepDiagnostics`); not finite where a delta is not."""
    total = sum(sum(part.square_norms) for part in parts)
    if not 0 < total < math.inf:
        return math.sqrt(total), 1.0
    agreed = sum(len(part.deltas) * part.mean_square for part in parts)
    entries = sum(len(delta) for part in parts for delta in part.deltas)
    return math.sqrt(total / entries), agreed / total


def fresh_rows(count: int, length: int, device: torch.device) -> Tensor:
    """Return uninitialised rows (count, length), float32, of one block.

    A large block lies on huge pages: its first use costs a fault for 2 MiB instead of 4 KiB
    (48 MB: 4 ms instead of 12). Linux gives them where it may ("madvise").
    """
    shape = (count, length + ROW_PADDING)
    num_bytes = 4 * math.prod(shape)
    block = None
    if device.type == "cpu" and num_bytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
            block = torch.frombuffer(pages, dtype=torch.float32).view(shape)
        except OSError:  # a kernel without them
            pass
    return (torch.empty(shape, device=device) if block is None else block)[:, :length]


def gather(block: Tensor, vectors: Sequence[Tensor], start: int) -> None:
    """Copy entries from `start` on of flat vectors (P_i,) to rows of a block; 0 past their ends."""
    for row, vector in zip(block, vectors, strict=True):
        part = vector[start : start + len(row)]
        row[: len(part)] = part
        row[len(part) :] = 0


def square_norm(vector: Tensor) -> Tensor:
    """Return |vector|^2, piece by piece: one float32 sum over 11 M entries is off by 4e-4."""
    norms = [torch.linalg.vector_norm(piece) for piece in torch.split(vector, 2**16)]
    return torch.stack(norms).double().square().sum()
