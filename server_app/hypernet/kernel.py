"""The hypernetwork in dual form: a base, a vector of each client's own, and a kernel.

    theta_i = b + sum_j K_ij a_j,      K_ij = k(v_i, v_j) / sum_l k(v_i, v_l),
    k(v, w) = max(0, cos(v, w)); with oneself 1, also where nothing has been learned yet

over the clients of a head group (docs/method.md, "What this project does by default"). b is what
all of a group share, a_j what client j adds, and the embeddings decide who takes how much of whose:
who joins takes from its like as soon as its embedding says who they are. Where fewer than
`min-sharing` clients of a size send deltas, what each learns is added to its own theta alone
(`num_sharing`, `KernelNetwork.alone`). The published heads are linear in H features of a client and
hold H + 1 numbers for each parameter; this form holds N + 1 and has no trunk. Where sizes differ
within a group, a shorter a_j counts as 0 beyond its end.

Shapes: n clients asked for, N clients of a group, P parameters of a client, C chunks of a group, S
chunk size, E embedding size.
"""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from common.config import HypernetSection
from common.log import logger
from common.seeding import torch_generator
from server_app.clients import GLOBAL_ID
from server_app.hypernet.base import LEAST_CLIENTS, Network, blocks
from server_app.hypernet.groups import (
    GPU_FACTOR,
    TILE_BYTES,
    fresh_rows,
    gather,
    group_order,
)

SILENT = 2
"""Who has sent nothing for more turns than that no longer counts as one who shares."""
MEMORY_SHARE = 0.5
"""Of the machine's memory that clients' vectors may fill; those of later clients lie on a disk."""
DISK_CLIENTS = 64
"""Generated together where vectors are read from a disk."""


@dataclass(frozen=True)
class KernelGroup:
    """What the clients of a group have in common.

    Attributes
    ----------
    base : b (C S,), float32.
    places, signs : (S,), the count sketch of the group (`sketch`).
    """

    base: Tensor
    places: Tensor
    signs: Tensor

    @property
    def num_chunks(self) -> int:
        """C, the most chunks of a client."""
        return len(self.base) // len(self.places)

    def sketch(self, change: Tensor, size: int) -> Tensor:
        """Return a change of theta (P,) in `size` numbers: a count sketch of its last entries.

        Each of the last min(P, S) entries is added to, or taken from, one number, drawn for its
        place counted from the end, alike for all clients of a group. Inner products are kept on
        average (Charikar, Chen, Farach-Colton 2002). Where clients differ shows most in the last
        layers; in all of theta, noise hides it.
        """
        last = change[-len(self.places) :]
        kept = torch.zeros(size, device=change.device)
        return kept.index_add_(0, self.places[-len(last) :], last * self.signs[-len(last) :])


class KernelNetwork(Network):
    """Generates from a base and the clients' own vectors, by likeness of embeddings.

    Attributes
    ----------
    groups : by key.
    personal : a_i (P_i,) by client_id; zero at first, as all of the following.
    embeddings : v_i (E,) by client_id.
    alone : by client_id what it has learned in a group of too few, (P_i,), which nobody takes.
    newest : the sketch (E,) of its newest delta by client_id, of who has sent one.
    """

    shape_keys = ("chunk-size", "embed-dim", "head-sharing")
    groups: dict[str, KernelGroup]
    embeddings: dict[str, Tensor]

    def __init__(
        self, section: HypernetSection, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(section, seed=seed, device=device)
        self.groups = {}
        self.personal: dict[str, Tensor] = {}
        self.embeddings = {}
        self.alone: dict[str, Tensor] = {}
        self.newest: dict[str, Tensor] = {}
        self._held = 0  # bytes of `personal` and `alone`
        self._turns: dict[str, int] = {}  # by client_id: in which turn of its group it sent a delta

    def _embed(self, client_id: str, key: str, num_heads: int) -> None:
        self.personal[client_id] = self.fresh_vector(client_id)
        self.embeddings[client_id] = torch.zeros(self.section.embed_dim, device=self.device)
        if key not in self.groups:
            self.groups[key] = self.make_group(
                key, torch.zeros(num_heads * self.section.chunk_size)
            )

    def fresh_vector(self, client_id: str) -> Tensor:
        """Return zeros (P,): in memory, or on a disk once the vectors of all fill their share."""
        size, was_on_disk = self._sizes[client_id], self._is_on_disk
        self._held += 4 * size
        if self._is_on_disk and not was_on_disk:
            logger.info(
                "Clients' vectors fill %.0f %% of memory; from client %s on they lie on disk, read "
                "once for every %d clients that parameters are generated for.",
                100 * MEMORY_SHARE,
                client_id,
                DISK_CLIENTS,
            )
        vector = zeros_on_disk(size) if self._is_on_disk else None
        return torch.zeros(size, device=self.device) if vector is None else vector

    @property
    def _is_on_disk(self) -> bool:
        return self.device.type == "cpu" and self._held > MEMORY_SHARE * memory_bytes()

    def blocks(self, client_ids: Sequence[str]) -> Iterator[Sequence[str]]:
        """See `Network.blocks`; each block reads the vectors of all, so from a disk it is large."""
        least = DISK_CLIENTS if self._is_on_disk else LEAST_CLIENTS
        return blocks(client_ids, self.num_parameters, least)

    def make_group(self, key: str, base: Tensor) -> KernelGroup:
        """Make a group; its sketch is drawn from the seed and its key."""
        s, generator = self.section, torch_generator(self.seed, f"sketch/{key}")
        places = torch.randint(s.embed_dim, (s.chunk_size,), generator=generator)
        signs = torch.randint(2, (s.chunk_size,), generator=generator) * 2.0 - 1.0
        return KernelGroup(*(x.to(self.device) for x in (base, places, signs)))

    def _forget(self, client_id: str) -> None:
        self._held -= self.personal.pop(client_id).nbytes
        if client_id in self.alone:
            self._held -= self.alone.pop(client_id).nbytes
        for kept in (self.embeddings, self.newest, self._turns):
            kept.pop(client_id, None)

    def note_senders(self, key: str, client_ids: Iterable[str]) -> None:
        """Remember who of a group has sent a delta.

        A turn ends when somebody sends again, and another has sent since it began.
        """
        members = self.members(key)
        turn = max(self._turns.get(client_id, 0) for client_id in members)
        sent = {client_id for client_id in members if self._turns.get(client_id) == turn}
        for client_id in dict.fromkeys(client_ids):
            if client_id in sent and len(sent) > 1:
                turn, sent = turn + 1, set()
            self._turns[client_id] = turn
            sent.add(client_id)

    def _senders(self, key: str) -> set[str]:
        """Return who has sent a delta in one of a group's last turns."""
        known = {c: self._turns[c] for c in self.members(key) if c in self._turns}
        newest = max(known.values(), default=0)
        return {client_id for client_id, turn in known.items() if turn >= newest - SILENT}

    def num_sharing(self, key: str, sending: Collection[str] = ()) -> int:
        """Count who shares in a group: nobody in one that is too small.

        Of two that share, each can compute every change of the other, and spoil it; and whose size
        one has, anybody chooses. So fewer than `min-sharing` that send share nothing, unless nobody
        else takes part, or they chose one another by name ("-" in the key: personal common models
        too); and one alone never does: what it learned by itself is not sent to whoever comes next.
        """
        members = self.members(key)
        senders, everybody = (
            sum(not client_id.startswith(GLOBAL_ID) for client_id in client_ids)
            for client_ids in (self._senders(key) | {*sending}, self._sizes)
        )
        least = max(2, min(self.section.min_sharing, everybody))
        enough = len(members) > 1 if "-" in key else senders >= least
        return len(members) if enough or members == [GLOBAL_ID] else 0

    def usual(self, key: str) -> Tensor:
        """Return the median of the senders' newest sketches (E,), number by number.

        In their mean one who sends what nobody's training does would make all others alike.
        """
        newest = [self.newest[c] for c in sorted(self._senders(key)) if c in self.newest]
        return torch.stack(newest).quantile(0.5, dim=0)

    def kernel(self, key: str, client_ids: Sequence[str]) -> tuple[list[str], Tensor]:
        """Return K_ij (n, N) of clients of one group, and the clients j."""
        if not self.num_sharing(key):
            return list(client_ids), torch.eye(len(client_ids), device=self.device)
        members = self.members(key)
        v_nE, w_NE = (
            functional.normalize(torch.stack([self.embeddings[c] for c in ids]), dim=1)
            for ids in (client_ids, members)
        )
        likeness_nN = (v_nE @ w_NE.T).clamp_(min=0)
        own = [members.index(client_id) for client_id in client_ids]
        likeness_nN[range(len(own)), own] = 1.0
        return members, likeness_nN / likeness_nN.sum(1, keepdim=True)

    def _emit(
        self, key: str, ids: Sequence[str], sizes: Sequence[int], chunks: Sequence[int] | None
    ) -> list[Tensor]:
        """See `Network.generate`; a tile of entries at a time for all, as long as it is cached."""
        members, weights_nN = self.kernel(key, ids)
        used = weights_nN.any(0).tolist()
        weights_nN = weights_nN[:, used]
        vectors = [self.personal[c] for c, is_used in zip(members, used, strict=True) if is_used]
        base, size = self.groups[key].base, self.section.chunk_size
        budget = TILE_BYTES * (GPU_FACTOR if base.is_cuda else 1) // 4
        step, most = max(size, budget // (len(ids) + len(vectors))), max(sizes)
        starts = [*range(0, most, step)]
        if chunks is not None:
            starts, step, most = [size * j for j in chunks], size, size * len(chunks)
        alone = [(row, self.alone[c]) for row, c in enumerate(ids) if c in self.alone]
        out_nP = fresh_rows(len(ids), most, self.device)
        rows_NT = fresh_rows(len(vectors), min(step, most), self.device)
        for start, out_nT in zip(starts, torch.split(out_nP, step, dim=1), strict=True):
            own_NT = rows_NT[:, : out_nT.shape[1]]
            gather(own_NT, vectors, start)
            torch.addmm(base[start : start + out_nT.shape[1]], weights_nN, own_NT, out=out_nT)
            for row, vector in alone:
                piece = vector[start : start + out_nT.shape[1]]
                out_nT[row, : len(piece)] += piece
        return [row[:entries] for row, entries in zip(out_nP, sizes, strict=True)]

    def named_parameters(self) -> dict[str, Tensor]:
        """Return `base.<key>` (C S,), and all else by client_id: `personal.`, `embeddings.`, ..."""
        named = {f"base.{k}": self.groups[k].base for k in sorted(self.groups, key=group_order)}
        named |= {f"personal.{client_id}": a for client_id, a in self.personal.items()}
        named |= {f"alone.{client_id}": c for client_id, c in self.alone.items()}
        named |= {f"newest.{client_id}": sketch for client_id, sketch in self.newest.items()}
        return named | {f"embeddings.{client_id}": v for client_id, v in self.embeddings.items()}

    def _facts(self) -> dict[str, Any]:
        return {"turns": dict(self._turns), "alone": [*self.alone], "newest": [*self.newest]}

    def _restore(self, own: Callable[..., Tensor], facts: Mapping[str, Any]) -> None:
        s = self.section
        for key, num_heads in facts["heads"].items():
            self.groups[key] = self.make_group(key, own(f"base.{key}", num_heads * s.chunk_size))
        for client_id, size in self._sizes.items():
            self.personal[client_id] = self.fresh_vector(client_id)
            self.personal[client_id].copy_(own(f"personal.{client_id}", size))
            self.embeddings[client_id] = own(f"embeddings.{client_id}", s.embed_dim)
        for client_id in facts.get("alone", []):
            self.alone[client_id] = self.fresh_vector(client_id)
            self.alone[client_id].copy_(own(f"alone.{client_id}", self._sizes[client_id]))
        for client_id in facts.get("newest", []):
            self.newest[client_id] = own(f"newest.{client_id}", s.embed_dim)
        self._turns = dict(facts.get("turns", dict.fromkeys(self._sizes, 0)))


@cache
def memory_bytes() -> int:
    """Return the memory of this machine, or what its container may have of it (cgroup v2)."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return total


def zeros_on_disk(size: int) -> Tensor | None:
    """Return zeros (size,), float32, in a file without a name; None where the disk has no place.

    The system keeps of it in memory what there is room for. All of it is reserved at once: a
    disk that is full later would end the process.
    """
    folder = os.environ.get("TMPDIR", "/var/tmp")  # /tmp is memory on many systems
    try:
        with NamedTemporaryFile(dir=folder, prefix="mh-pfedhn-") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
            vector = torch.from_file(file.name, shared=True, size=size)
    except OSError as error:
        logger.warning("No place on %s for a vector of %d MB (%s).", folder, size // 250_000, error)
        return None
    return vector
