"""One head for all chunks of a group (`head-layout = "one"`): memory that does not grow with K.

A chunk's place is in its embedding: the rows of a client start from a pattern of their places that
is the same for all clients of the group (`place_rows`), and differ from each other by that. A group
has H S + S parameters instead of C (H S + S), 79 times fewer for the CNN. Differs from paper:
section 3.2 gives every chunk a head of its own.

Shapes: N clients, C chunks of the group, S chunk size, H hidden size, E embedding size.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from server_app.hypernet.heads import HeadGroup, HeadPullback
from server_app.hypernet.memory import Scratch, fresh

PLACE_STD = 1.0
"""Places must be told apart before anything was learned: theta would repeat chunk by chunk."""


def place_rows(num_chunks: int, embed_dim: int, generator: torch.Generator) -> Tensor:
    """Draw the pattern of places (C, E)."""
    return PLACE_STD * torch.randn(num_chunks, embed_dim, generator=generator)


class SharedHead(HeadGroup):
    """A head group with one Linear(H, S): weight (1, H, S), bias (1, S)."""

    def __init__(self, weight: Tensor, bias: Tensor, num_chunks: int) -> None:
        super().__init__(weight, bias)
        self._num_chunks = num_chunks

    @property
    def num_chunks(self) -> int:
        """C, the chunks that the one head emits."""
        return self._num_chunks

    def to(self, device: torch.device) -> SharedHead:
        """Return the group on a device."""
        weight, bias = self.weight.detach().to(device), self.bias.detach().to(device)
        return SharedHead(weight, bias, self._num_chunks)

    @torch.no_grad()
    def forward(
        self, features_CNH: Tensor, sizes: Sequence[int], *, bfloat16: bool = False
    ) -> list[Tensor]:
        """Emit theta_i (P_i,) of every client, as `HeadGroup.forward`: one product."""
        weight_HS, bias_S = self.weight[0], self.bias[0]
        rows_NCH = features_CNH.transpose(0, 1).reshape(-1, features_CNH.shape[2])
        block = fresh(len(sizes), self.num_chunks * self.chunk_size, device=self.weight.device)
        out = block.view(-1, self.chunk_size)
        if bfloat16:
            torch.add(rows_NCH.bfloat16() @ weight_HS.bfloat16(), bias_S, out=out)
        else:
            torch.addmm(bias_S, rows_NCH, weight_HS, out=out)
        return [block[i, :size] for i, size in enumerate(sizes)]

    @torch.no_grad()
    def backward(
        self,
        features_CNH: Tensor,
        deltas: Sequence[Tensor],
        shares: Tensor,
        *,
        scratch: Scratch,
    ) -> HeadPullback:
        """Pull the deltas back, as `HeadGroup.backward`; the gradient is the sum over chunks."""
        weight_HS = self.weight[0]
        within = shares / shares.sum()
        weighted_CNH = features_CNH * within[:, None]
        pulled = torch.empty_like(features_CNH, memory_format=torch.contiguous_format)
        squares = torch.zeros(len(deltas), dtype=torch.float64, device=shares.device)
        mean_square = torch.zeros((), dtype=torch.float64, device=shares.device)
        grad_weight, grad_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        for tile in self.tiles(0, self.num_chunks, rows=len(deltas), budget=self.tile_bytes):
            delta_cNS = self.pack(deltas, tile, scratch).transpose(0, 1)
            mean_cS = torch.matmul(within, delta_cNS)
            for place, delta_NS in zip(range(tile.start, tile.stop), delta_cNS, strict=True):
                grad_weight[0].addmm_(weighted_CNH[place].T, delta_NS)
                torch.mm(delta_NS, weight_HS.T, out=pulled[place])
            grad_bias[0] += mean_cS.sum(0)
            squares += torch.linalg.vector_norm(delta_cNS, dim=2).double().square().sum(0)
            mean_square += torch.linalg.vector_norm(mean_cS, dim=1).double().square().sum()
        pulled *= shares[:, None]
        self.weight.grad, self.bias.grad = grad_weight, grad_bias
        own = _square(grad_weight) + _square(grad_bias)
        # the bias gradient is a sum over chunks here: its norm is not that of the mean delta
        return HeadPullback(pulled, squares, mean_square, own - mean_square)

    @classmethod
    def draw_one(
        cls, *, num_chunks: int, chunk_size: int, hidden_dim: int, generator: torch.Generator
    ) -> SharedHead:
        """Make a group with torch's default Linear initialisation."""
        one = HeadGroup.draw(
            num_chunks=1, chunk_size=chunk_size, hidden_dim=hidden_dim, generator=generator
        )
        return cls(one.weight.detach(), one.bias.detach(), num_chunks)


def _square(tensor: nn.Parameter | Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor.double())
    return norm.square()
