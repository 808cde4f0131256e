"""The published hypernetwork: per-client embeddings, one trunk, and heads shared by groups.

Client i owns an embedding v_i with one row a chunk. The trunk turns rows into features, and head j
of the client's group turns the features of row j into chunk j of theta_i (paper section 3.2;
docs/method.md, "Hypernetwork").

Where clients of different sizes share a group, each has as many rows as the group has heads: its
own, and zeros behind them, of which nothing is emitted and nothing is learned.

Products work on a few chunks for ALL clients at once: what they read and write stays in the cache
until everything that needs it is done, and memory for gathered deltas is bounded by `TILE_BYTES`.

Shapes: N clients of a group, C chunks of a group, c chunks of one piece of work, S chunk size, E
embedding size, H hidden size, P parameters of a client (the paper's K_i; differs between clients
within the last chunk), R rows of several embeddings one after the other.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.config import HypernetSection
from common.seeding import torch_generator
from server_app.hypernet.base import Network
from server_app.hypernet.groups import (
    GPU_FACTOR,
    TILE_BYTES,
    fresh_rows,
    gather,
    group_order,
    num_chunks,
)

TRUNK_LAYERS = 3
WORK_BYTES = 8 * 2**20  # what one product reads and writes


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
        """Draw a group as torch does a Linear: U(-1/sqrt(H), 1/sqrt(H)) for everything."""
        bound = 1 / math.sqrt(section.hidden_dim)
        weight = torch.empty(num_chunks, section.hidden_dim, section.chunk_size)
        bias = torch.empty(num_chunks, section.chunk_size)
        for tensor in (weight, bias):
            tensor.uniform_(-bound, bound, generator=generator)
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
        block = fresh_rows(count, emitted * self.chunk_size, self.bias.device)
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
            block = fresh_rows(count, (tile.stop - tile.start) * size, self.bias.device)
            gather(block, vectors, tile.start * size)
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


class Hypernetwork(Network):
    """Generates client parameters and pulls pseudo-gradients back.

    Attributes
    ----------
    trunk : Linear(E, H), ReLU, then Linear(H, H), ReLU twice.
    groups : linear heads by key.
    embeddings : v_i (C_i, E) by client_id.
    """

    shape_keys = ("chunk-size", "embed-dim", "hidden-dim", "head-sharing")
    groups: dict[str, HeadGroup]
    embeddings: dict[str, nn.Parameter]

    def __init__(
        self, section: HypernetSection, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(section, seed=seed, device=device)
        self.trunk = _draw_trunk(section, torch_generator(seed, "trunk")).to(self.device)
        self.groups = {}
        self.embeddings = {}

    def _embed(self, client_id: str, key: str, num_heads: int) -> None:
        s, generator = self.section, torch_generator(self.seed, "embedding", client_id=client_id)
        chunks = num_chunks(self._sizes[client_id], s.chunk_size)
        rows = torch.randn(chunks, s.embed_dim, generator=generator) * s.embedding_std
        self.embeddings[client_id] = nn.Parameter(rows.to(self.device))
        if key not in self.groups:
            drawn = HeadGroup.draw(s, num_heads, torch_generator(self.seed, f"head/{key}"))
            self.groups[key] = drawn.to(self.device)

    def _forget(self, client_id: str) -> None:
        del self.embeddings[client_id]

    def _emit(
        self, key: str, ids: Sequence[str], sizes: Sequence[int], chunks: Sequence[int] | None
    ) -> list[Tensor]:
        return self.groups[key].forward(self.features(ids, chunks), sizes, chunks)

    @torch.no_grad()
    def features(self, client_ids: Sequence[str], chunks: Sequence[int] | None = None) -> Tensor:
        """Return the trunk's output for clients of one head group, (C, N, H); of some chunks."""
        rows_RE = self.rows(client_ids)
        if chunks is not None:
            rows_RE = rows_RE.view(len(client_ids), -1, rows_RE.shape[1])[:, chunks].flatten(0, 1)
        features_RH: Tensor = self.trunk(rows_RE)
        return by_chunk(features_RH, len(client_ids))

    def rows(self, client_ids: Sequence[str]) -> Tensor:
        """Stack the embeddings of clients of one group (N C, E), zeros where one has no chunk."""
        chunks = self.groups[self._keys[client_ids[0]]].num_chunks
        rows_NCE = torch.zeros(len(client_ids), chunks, self.section.embed_dim, device=self.device)
        for rows_CE, client_id in zip(rows_NCE, client_ids, strict=True):
            own_CE = self.embeddings[client_id].detach()
            rows_CE[: len(own_CE)] = own_CE
        return rows_NCE.flatten(0, 1)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return phi and all embeddings by name.

        `trunk.<layer>.weight`, `heads.<key>.weight` (C, H, S), `heads.<key>.bias` (C, S),
        `embeddings.<client_id>` (C, E).
        """
        named = {f"trunk.{name}": p for name, p in self.trunk.named_parameters()}
        for key in sorted(self.groups, key=group_order):
            named[f"heads.{key}.weight"] = self.groups[key].weight
            named[f"heads.{key}.bias"] = self.groups[key].bias
        return named | {f"embeddings.{client_id}": v for client_id, v in self.embeddings.items()}

    def _restore(self, own: Callable[..., Tensor], facts: Mapping[str, Any]) -> None:
        s = self.section
        for name, parameter in self.trunk.named_parameters():
            parameter.data.copy_(own(f"trunk.{name}", *parameter.shape))
        for key, count in facts["heads"].items():
            weight = own(f"heads.{key}.weight", count, s.hidden_dim, s.chunk_size)
            self.groups[key] = HeadGroup(weight, own(f"heads.{key}.bias", count, s.chunk_size))
        for client_id in self._sizes:
            rows = own(f"embeddings.{client_id}", self.num_chunks(client_id), s.embed_dim)
            self.embeddings[client_id] = nn.Parameter(rows)


def by_chunk(rows_RH: Tensor, num_clients: int) -> Tensor:
    """View rows of clients one after the other (N C, H) as (C, N, H)."""
    return rows_RH.view(num_clients, -1, rows_RH.shape[1]).transpose(0, 1)


def _draw_trunk(section: HypernetSection, generator: torch.Generator) -> nn.Sequential:
    """Draw the trunk by torch's default Linear initialisation, from the generator (CPU)."""
    layers: list[nn.Module] = []
    width = section.embed_dim
    for _ in range(TRUNK_LAYERS):
        linear = nn.Linear(width, section.hidden_dim, device="meta").to_empty(device="cpu")
        for tensor in (linear.weight, linear.bias):
            tensor.data.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        layers += [linear, nn.ReLU()]
        width = section.hidden_dim
    return nn.Sequential(*layers)
