"""One head group: the linear heads that clients with equally many chunks share.

Both directions work on tiles of a few chunks for ALL clients at once. A tile, what goes into it
and what comes out of it stay in the cache until everything that needs them is done; the scratch
memory is bounded by `TILE_BYTES` however many clients there are; and every weight is read, and
every gradient written, exactly once.

Shapes: N clients, C chunks of the group, c chunks of one tile, S chunk size, H hidden size,
P parameters of a client (the paper's K_i; differs from client to client within the last chunk).
"""

# ruff: noqa: N803, N806, N815 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server_app.aggregation.ledger import Ledger
from server_app.hypernet.memory import Scratch, empty_rows

TILE_BYTES = 16 * 2**20  # half of a common L3 cache; at least one chunk is always taken
WORK_BYTES = 8 * 2**20  # what the products of one step of the loop read and write together


@dataclass(frozen=True)
class HeadPullback:
    """What the heads hand back to the trunk, and what was learned about the deltas on the way.

    Attributes
    ----------
    features_CNH : gradient of the features, each client's scaled by its share of the step.
    square_norms : |delta_i|^2 of each client (N,), float64, of the unweighted deltas.
    mean_square_norm : |weighted mean of the deltas|^2, a scalar tensor, float64. It is the squared
        norm of the bias gradient.
    weight_square_norm : squared norm of the weight gradient, a scalar tensor, float64.
    """

    features_CNH: Tensor
    square_norms: Tensor
    mean_square_norm: Tensor
    weight_square_norm: Tensor

    @property
    def square_norm(self) -> Tensor:
        """Squared norm of the group's whole gradient, a scalar tensor, float64."""
        return self.mean_square_norm + self.weight_square_norm


class HeadGroup:
    """C separate Linear(H, S) layers, stored as one tensor.

    Attributes
    ----------
    weight : (C, H, S) float32, the transpose of nn.Linear's: all three products of a step then run
        along contiguous rows (measured: 1.3 times faster for 50 clients, 3 times for one).
        Its `grad` is a buffer that is kept and reused between steps.
    bias : (C, S) float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = nn.Parameter(weight)
        self._bias = nn.Parameter(bias)
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._ledger: Ledger | None = None

    @classmethod
    def draw(
        cls, *, num_chunks: int, chunk_size: int, hidden_dim: int, generator: torch.Generator
    ) -> HeadGroup:
        """Make a group with torch's default Linear initialisation, U(-1/sqrt(H), 1/sqrt(H))."""
        bound = 1 / math.sqrt(hidden_dim)
        weight = torch.empty(num_chunks, hidden_dim, chunk_size)
        bias = torch.empty(num_chunks, chunk_size)
        for tensor in (weight, bias):
            tensor.uniform_(-bound, bound, generator=generator)
        return cls(weight, bias)

    def to(self, device: torch.device) -> HeadGroup:
        """Return the group on a device."""
        return HeadGroup(self.weight.detach().to(device), self.bias.detach().to(device))

    @property
    def weight(self) -> nn.Parameter:
        """(C, H, S); whoever reads it ends a `Ledger`."""
        self.settle()
        return self._weight

    @property
    def bias(self) -> nn.Parameter:
        """(C, S); whoever reads it ends a `Ledger`."""
        self.settle()
        return self._bias

    @property
    def ledger(self) -> Ledger | None:
        """What the clients hold, where it is kept beside the heads."""
        return self._ledger

    @torch.no_grad()
    def open_ledger(self, members: Sequence[str], features_CNH: Tensor, damping: float) -> Ledger:
        """Return the ledger of these clients; the one that is open, if it is theirs.

        Valid while their features and the damping are what they were.
        """
        if self._ledger is None or self._ledger.members != list(members):
            theta_NL = self._emit(features_CNH)
            heads = (self._weight.detach(), self._bias.detach())
            self._ledger = Ledger(heads, members, features_CNH, theta_NL, damping)
        return self._ledger

    @torch.no_grad()
    def settle(self) -> None:
        """End the ledger, if there is one: the heads get what they are owed."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.settle()

    @property
    def num_chunks(self) -> int:
        """C, the number of heads."""
        return self._weight.shape[0]

    @property
    def chunk_size(self) -> int:
        """S, the entries that one head emits."""
        return self._weight.shape[2]

    @property
    def hidden_dim(self) -> int:
        """H, the entries of a feature."""
        return self._weight.shape[1]

    @torch.no_grad()
    def forward(
        self, features_CNH: Tensor, sizes: Sequence[int], *, bfloat16: bool = False
    ) -> list[Tensor]:
        """Emit theta_i (P_i,) of every client, truncated to its size; no graph is recorded.

        They are rows of one block of memory, which is freed with the last of them. With `bfloat16`
        the operands of the products are rounded to it, and the products too, before the bias.
        """
        block = self._emit(features_CNH, bfloat16=bfloat16)
        return [block[i, :size] for i, size in enumerate(sizes)]

    def _emit(self, features_CNH: Tensor, *, bfloat16: bool = False) -> Tensor:
        """Emit all chunks of every client, (N, C S)."""
        count, length = features_CNH.shape[1], self.num_chunks * self.chunk_size
        block = empty_rows(count, length, device=self.weight.device)
        out_CNS = block.view(count, *self.bias.shape).transpose(0, 1)
        rows = count + self.hidden_dim
        for work in self.tiles(0, self.num_chunks, rows=rows, budget=self.work_bytes):
            bias_c1S, weight_cHS = self.bias[work].unsqueeze(1), self.weight[work]
            if bfloat16:
                short = torch.bmm(features_CNH[work].bfloat16(), weight_cHS.bfloat16())
                torch.add(short, bias_c1S, out=out_CNS[work])
            else:
                torch.baddbmm(bias_c1S, features_CNH[work], weight_cHS, out=out_CNS[work])
        return block

    @torch.no_grad()
    def backward(
        self,
        features_CNH: Tensor,
        deltas: Sequence[Tensor],
        shares: Tensor,
        *,
        scratch: Scratch,
    ) -> HeadPullback:
        """Pull the deltas back through the heads; overwrite `weight.grad` and `bias.grad`.

        Heads are linear, so nothing of a forward pass is needed: with share w_i,
        dW_c = sum_i w_i f_i,c delta_i,c^T / sum w, db_c = sum_i w_i delta_i,c / sum w, and
        df_i,c = w_i W_c delta_i,c. The heads' own gradient is the mean over this group's clients.

        Parameters
        ----------
        features_CNH
            The trunk's output for these clients.
        deltas
            (P_i,) each.
        shares
            (N,) float32, positive; the clients' shares of the whole step.
        scratch
            Memory for tiles; overwritten.
        """
        grad_weight, grad_bias = self._gradient_buffers()
        within = shares / shares.sum()
        weighted_CNH = features_CNH * within[:, None]
        pulled = torch.empty_like(features_CNH, memory_format=torch.contiguous_format)
        squares = torch.zeros(len(deltas), dtype=torch.float64, device=shares.device)
        weight_square = torch.zeros((), dtype=torch.float64, device=shares.device)
        for delta_NcS, work in self.packed(deltas, scratch):
            delta_cNS = delta_NcS.transpose(0, 1)
            grad_cHS = grad_weight[work]
            torch.bmm(weighted_CNH[work].transpose(1, 2), delta_cNS, out=grad_cHS)
            torch.bmm(delta_cNS, self.weight[work].transpose(1, 2), out=pulled[work])
            torch.matmul(within, delta_cNS, out=grad_bias[work])
            squares += torch.linalg.vector_norm(delta_NcS, dim=2).double().square().sum(1)
            weight_square += torch.linalg.vector_norm(grad_cHS, dim=2).double().square().sum()
        pulled *= shares[:, None]
        self.weight.grad, self.bias.grad = grad_weight, grad_bias
        mean_square = torch.linalg.vector_norm(grad_bias, dim=1).double().square().sum()
        return HeadPullback(pulled, squares, mean_square, weight_square)

    def _gradient_buffers(self) -> tuple[Tensor, Tensor]:
        if self._gradients is None:
            self._gradients = torch.empty_like(self.weight), torch.empty_like(self.bias)
        return self._gradients

    @property
    def work_bytes(self) -> int:
        """Bytes one product may touch; a GPU wants few launches more than a small footprint."""
        return WORK_BYTES if self._weight.device.type == "cpu" else 64 * WORK_BYTES

    @property
    def tile_bytes(self) -> int:
        """Bytes of deltas that are gathered at a time; for a GPU in few large copies."""
        return TILE_BYTES if self._weight.device.type == "cpu" else 64 * TILE_BYTES

    def tiles(self, first: int, stop: int, *, rows: int, budget: int) -> Iterator[slice]:
        """Cut chunks into runs that touch at most `budget` bytes, at `rows` rows (S,) a chunk."""
        chunks = max(1, budget // (4 * rows * self.chunk_size))
        for start in range(first, stop, chunks):
            yield slice(start, min(start + chunks, stop))

    def packed(self, deltas: Sequence[Tensor], scratch: Scratch) -> Iterator[tuple[Tensor, slice]]:
        """Yield deltas (P_i,) as (N, c, S), zero beyond a client's last entry, and which chunks.

        They are gathered a tile at a time and yielded in pieces that one product may touch.
        """
        rows = len(deltas) + self.hidden_dim
        for tile in self.tiles(0, self.num_chunks, rows=len(deltas), budget=self.tile_bytes):
            packed_NcS = self.pack(deltas, tile, scratch)
            for work in self.tiles(tile.start, tile.stop, rows=rows, budget=self.work_bytes):
                yield packed_NcS[:, work.start - tile.start : work.stop - tile.start], work

    def pack(self, deltas: Sequence[Tensor], tile: slice, scratch: Scratch) -> Tensor:
        """Gather a tile of all deltas into (N, c, S), zero beyond a client's last entry."""
        packed = scratch.take(len(deltas), tile.stop - tile.start, self.chunk_size)
        for i, delta in enumerate(deltas):
            full = max(0, delta.numel() // self.chunk_size - tile.start)
            packed[i, full:].zero_()
            for part, row in self._spans(delta, packed[i], tile):
                row.copy_(part)
        return packed

    def _spans(
        self, vector: Tensor, chunks_cS: Tensor, tile: slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair the entries of a flat (P,) vector with their places in a tile (c, S)."""
        size = self.chunk_size
        span = vector[tile.start * size : tile.stop * size]
        full = span.numel() // size
        yield span[: full * size].view(full, size), chunks_cS[:full]
        if rest := span.numel() - full * size:
            yield span[full * size :], chunks_cS[full, :rest]
