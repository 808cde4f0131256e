"""Head groups: who shares heads, the linear heads of one group, and the deltas of its clients.

Products work on a few chunks for ALL clients at once: what they read and write stays in the cache
until everything that needs it is done, and memory for gathered deltas is bounded by `TILE_BYTES`.

Shapes: N clients, C chunks of the group, c chunks of one piece of work, S chunk size, H hidden
size, P parameters of a client (the paper's K_i; differs between clients within the last chunk).
"""

# ruff: noqa: N802, N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from common.config import HypernetSection

TILE_BYTES = 16 * 2**20  # of gathered deltas: half of a common L3 cache
WORK_BYTES = 8 * 2**20  # what one product reads and writes
GPU_FACTOR = 64  # a GPU wants few launches more than a small footprint
HUGE_BYTES = 4 * 2**20  # blocks from here on are put on huge pages
ROW_PADDING = 16  # floats; rows a multiple of 4 KiB apart would fall into the same cache sets


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


class HeadGroup:
    """C separate Linear(H, S) layers, stored as one tensor.

    Attributes
    ----------
    weight : (C, H, S) float32, the transpose of nn.Linear's: every product then runs along
        contiguous rows (1.3 times faster for 50 clients, 3 times for one).
    bias : (C, S) float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self._gradient: Tensor | None = None  # of the weight; fresh memory each step costs faults

    @classmethod
    def draw(
        cls, section: HypernetSection, num_chunks: int, generator: torch.Generator
    ) -> HeadGroup:
        """Make a group as `head-init` says; "torch" is U(-1/sqrt(H), 1/sqrt(H)) for everything."""
        bound = 1 / math.sqrt(section.hidden_dim)
        weight = torch.empty(num_chunks, section.hidden_dim, section.chunk_size)
        bias = torch.empty(num_chunks, section.chunk_size)
        for tensor in (weight, bias):
            tensor.uniform_(-bound, bound, generator=generator)
        if section.head_init != "torch":
            weight.zero_()
        if section.head_init == "zero":
            bias.zero_()
        return cls(weight, bias)

    def to(self, device: torch.device) -> HeadGroup:
        """Return the group on a device."""
        return HeadGroup(self.weight.detach().to(device), self.bias.detach().to(device))

    @property
    def num_chunks(self) -> int:
        """C, the number of heads."""
        return self.weight.shape[0]

    @property
    def chunk_size(self) -> int:
        """S, the entries that one head emits."""
        return self.weight.shape[2]

    @torch.no_grad()
    def forward(
        self, features_CNH: Tensor, sizes: Sequence[int], chunks: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Emit theta_i (P_i,) of every client; no graph is recorded.

        They are rows of one block of memory, which is freed with the last of them. `sizes` says how
        many entries are wanted of each client; with `chunks` these alone are emitted, one after the
        other, and `features_CNH` are theirs.
        """
        count, emitted = len(sizes), len(features_CNH)
        block = _fresh_rows(count, emitted * self.chunk_size, self.bias.device)
        out_CNS = block.view(count, emitted, -1).transpose(0, 1)
        rows = count + features_CNH.shape[2]
        pieces = [*self._pieces(range(emitted), rows, WORK_BYTES)]
        heads = pieces
        if chunks is not None:
            pieces, heads = ([slice(j, j + 1) for j in found] for found in (range(emitted), chunks))
        for piece, head in zip(pieces, heads, strict=True):
            bias_c1S = self.bias[head].unsqueeze(1)
            torch.baddbmm(bias_c1S, features_CNH[piece], self.weight[head], out=out_CNS[piece])
        return [row[:size] for row, size in zip(block, sizes, strict=True)]

    @torch.no_grad()
    def pull_back(
        self, features_CNH: Tensor, deltas: Sequence[Tensor], shares: Tensor, *, learns: bool
    ) -> tuple[Tensor, float]:
        """Pull the deltas (P_i,) back through the heads.

        Heads are linear, so nothing of a forward pass is needed: with share w_i of the step,
        df_i,c = w_i W_c delta_i,c, and where the group `learns`,
        dW_c = sum_i w_i f_i,c delta_i,c^T / sum w becomes `weight.grad`. It is the mean over this
        group's clients, and so is the gradient of the bias, the mean delta.
        Returns the gradient of the features (C, N, H), and the squared norm of dW.
        """
        within_NS = (shares / shares.sum())[:, None]
        gradient = self._gradient_buffer() if learns else None
        pulled_CNH = torch.empty_like(features_CNH, memory_format=torch.contiguous_format)
        square = torch.zeros((), dtype=torch.float64, device=shares.device)
        for work, delta_cNS in self.gathered(deltas):
            torch.bmm(delta_cNS, self.weight[work].transpose(1, 2), out=pulled_CNH[work])
            if gradient is not None:
                across_cHN = (features_CNH[work] * within_NS).transpose(1, 2)
                torch.bmm(across_cHN, delta_cNS, out=gradient[work])
                square += torch.linalg.vector_norm(gradient[work], dim=2).double().square().sum()
        self.weight.grad = gradient
        return pulled_CNH.mul_(shares[:, None]), float(square)

    def gathered(self, vectors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield flat vectors (P_i,) a few chunks at a time, (c, N, S), zero beyond their ends.

        What is yielded is overwritten later: use it before the next.
        """
        count, size = len(vectors), self.chunk_size
        rows = count + self.weight.shape[1]
        for tile in self._pieces(range(self.num_chunks), count, TILE_BYTES):
            block = _fresh_rows(count, (tile.stop - tile.start) * size, self.bias.device)
            for row, vector in zip(block, vectors, strict=True):
                part = vector[tile.start * size : tile.stop * size]
                row[: len(part)] = part
                row[len(part) :] = 0
            chunks_cNS = block.view(count, -1, size).transpose(0, 1)
            for work in self._pieces(range(tile.start, tile.stop), rows, WORK_BYTES):
                yield work, chunks_cNS[work.start - tile.start : work.stop - tile.start]

    def _pieces(self, chunks: range, rows: int, budget: int) -> Iterator[slice]:
        """Cut chunks into pieces within a budget of bytes, at `rows` rows (S,) a chunk."""
        budget *= GPU_FACTOR if self.weight.device.type == "cuda" else 1
        most = max(1, budget // (4 * rows * self.chunk_size))
        for start in chunks[::most]:
            yield slice(start, min(start + most, chunks.stop))

    def _gradient_buffer(self) -> Tensor:
        if self._gradient is None:
            self._gradient = torch.empty_like(self.weight, requires_grad=False)
        return self._gradient


def _fresh_rows(count: int, length: int, device: torch.device) -> Tensor:
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


@dataclass(frozen=True)
class GroupDeltas:
    """The deltas of one step that belong to one head group.

    Attributes
    ----------
    client_ids : who sent them; one may appear twice (two of its replies in one step).
    deltas : (P_i,) each, on the hypernetwork's device.
    shares : (n,) float32, positive; the shares of the whole step.
    """

    key: str
    group: HeadGroup
    client_ids: Sequence[str]
    deltas: Sequence[Tensor]
    shares: Tensor

    @cached_property
    def square_norms(self) -> list[float]:
        """|delta_i|^2 of each; not finite where an entry is not, or a norm is beyond float32."""
        squares: list[float] = torch.stack([square_norm(delta) for delta in self.deltas]).tolist()
        return squares

    @property
    def mean_square(self) -> float:
        """|mean delta|^2."""
        return float(square_norm(self.mean_CS.view(-1)))

    @cached_property
    def mean_CS(self) -> Tensor:
        """Their mean by shares (C, S), each padded with zeros: the gradient of the bias."""
        mean_CS = torch.zeros_like(self.group.bias, requires_grad=False)
        within = (self.shares / self.shares.sum()).tolist()
        for delta, weight in zip(self.deltas, within, strict=True):
            mean_CS.view(-1)[: len(delta)].add_(delta, alpha=weight)
        return mean_CS


def square_norm(vector: Tensor) -> Tensor:
    """Return |vector|^2, piece by piece: one float32 sum over 11 M entries is off by 4e-4."""
    norms = [torch.linalg.vector_norm(piece) for piece in torch.split(vector, 2**16)]
    return torch.stack(norms).double().square().sum()
