"""The hypernetwork: per-client embeddings, one trunk, and heads shared by groups of clients.

Client i owns an embedding v_i with one row a chunk. The trunk turns rows into features, and head j
of the client's group turns the features of row j into chunk j of theta_i (paper section 3.2;
docs/method.md, "Hypernetwork"). Sizes are known here, never an architecture, and no update rule.

Where clients of different sizes share a group, each has as many rows as the group has heads: its
own, and zeros behind them, of which nothing is emitted and nothing is learned.

Shapes: N clients of a group, C chunks of a group, S chunk size, E embedding size, H hidden size,
P parameters of a client (the paper's K_i), R rows of several embeddings one after the other.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.compression import Float32
from common.config import HypernetSection
from common.errors import CheckpointError, RegistrationError, listing
from common.seeding import torch_generator
from common.serialization import require_same, required_tensor
from server_app.hypernet.heads import (
    HeadGroup,
    group_order,
    head_group,
    members_by_group,
    num_chunks,
)

TRUNK_LAYERS = 3
BLOCK_CLIENTS = 64
BLOCK_BYTES = 256 * 2**20
LEAST_CLIENTS = 8
"""A block never has fewer for its size alone: reading the heads of 11 M parameters costs more."""
SHAPE_KEYS = ("chunk-size", "embed-dim", "hidden-dim", "head-sharing")


class Hypernetwork:
    """Generate client parameters and pull pseudo-gradients back; clients come and go any time.

    What a client or group starts from depends on the seed and its own id or key alone, not on the
    order of arrival. It is drawn on the CPU, so it does not depend on the device either.

    Attributes
    ----------
    trunk : Linear(E, H), ReLU, then Linear(H, H), ReLU twice.
    groups : head groups by key; see `server_app.hypernet.heads.head_group`.
    embeddings : v_i (C_i, E) by client_id.
    """

    def __init__(
        self, section: HypernetSection, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.section = section
        self.seed = seed
        self.device = torch.device(device)
        self.trunk = _draw_trunk(section, torch_generator(seed, "trunk")).to(self.device)
        self.groups: dict[str, HeadGroup] = {}
        self.embeddings: dict[str, nn.Parameter] = {}
        self._sizes: dict[str, int] = {}
        self._keys: dict[str, str] = {}

    # --- clients ---------------------------------------------------------------------------------

    def add_client(
        self, client_id: str, num_parameters: int, *, tag: str = "", group: str = ""
    ) -> None:
        """Give a client an embedding and a head group, an old or a new one.

        A declared `tag` counts where `head-sharing = "tag"`; who names a `group` shares with all
        of the same name and size, whatever `head-sharing` says. Raises RegistrationError where the
        client is known already, or its size is outside 1..max-parameters.
        """
        if client_id in self._sizes:
            raise RegistrationError(
                f"client {client_id!r} has an embedding for {self._sizes[client_id]} parameters "
                "already. Remove it first when the client changed its model."
            )
        s = self.section
        if not 1 <= num_parameters <= s.max_parameters:
            raise RegistrationError(
                f"client {client_id!r} asks for {num_parameters} parameters; 1 to "
                f"{s.max_parameters} are allowed. Use a smaller model, or raise max-parameters in "
                "the run config."
            )
        chunks = num_chunks(num_parameters, s.chunk_size)
        generator = torch_generator(self.seed, "embedding", client_id=client_id)
        rows = torch.randn(chunks, s.embed_dim, generator=generator) * s.embedding_std
        self.embeddings[client_id] = nn.Parameter(rows.to(self.device))
        key, heads = (
            (f"{chunks}-{group}", chunks) if group else head_group(s, client_id, chunks, tag)
        )
        if key not in self.groups:
            drawn = HeadGroup.draw(s, heads, torch_generator(self.seed, f"head/{key}"))
            self.groups[key] = drawn.to(self.device)
        self._sizes[client_id], self._keys[client_id] = num_parameters, key

    def remove_client(self, client_id: str) -> None:
        """Forget a client's embedding; its head group stays, for it holds what others learned."""
        self._require(client_id)
        del self._sizes[client_id], self._keys[client_id], self.embeddings[client_id]

    def has_client(self, client_id: str) -> bool:
        """Whether the client owns an embedding."""
        return client_id in self._sizes

    def is_same(self, client_id: str, num_parameters: int, tag: str) -> bool:
        """Whether a known client still has this size, and this tag where tags count."""
        key, _ = head_group(self.section, client_id, self.num_chunks(client_id), tag)
        return self._sizes[client_id] == num_parameters and self._keys[client_id] == key

    def clients(self) -> list[str]:
        """Return the known client_ids in order of arrival."""
        return list(self._sizes)

    def members(self, key: str) -> list[str]:
        """Return the clients of a head group, sorted."""
        return sorted(client_id for client_id, own in self._keys.items() if own == key)

    def num_parameters(self, client_id: str) -> int:
        """Return P, the paper's K_i, of a known client."""
        self._require(client_id)
        return self._sizes[client_id]

    def num_chunks(self, client_id: str) -> int:
        """Return the paper's tau_i of a known client."""
        return num_chunks(self.num_parameters(client_id), self.section.chunk_size)

    def group_key(self, client_id: str) -> str:
        """Return the key of a known client's head group."""
        self._require(client_id)
        return self._keys[client_id]

    # --- generate --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, client_ids: Sequence[str], chunks: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Generate theta_i = h(v_i; phi) for several clients, one batched product per head group.

        With `chunks` (ascending; of clients of one group) only these, one after the other. Returns
        theta (P_i,), float32, on `device`, by client_id in the order asked for; those of one head
        group share a block of memory. Raises RegistrationError where a client is not known.
        """
        thetas: dict[str, Tensor] = {}
        for key, positions in members_by_group(client_ids, self.group_key).items():
            ids, group = [client_ids[i] for i in positions], self.groups[key]
            sizes = [self._sizes[client_id] for client_id in ids]
            if chunks is not None:
                size = group.chunk_size
                sizes = [sum(min(size, max(0, p - size * j)) for j in chunks) for p in sizes]
            emitted = group.forward(self.features(ids, chunks), sizes, chunks)
            thetas |= zip(ids, emitted, strict=True)
        return {client_id: thetas[client_id] for client_id in client_ids}

    def thetas(self, client_ids: Sequence[str]) -> Iterator[tuple[str, Float32]]:
        """Generate as `generate`, as numpy, a block of clients at a time, when it is asked for."""
        for block in blocks(client_ids, self.num_parameters):
            for client_id, theta in self.generate(block).items():
                yield client_id, theta.cpu().numpy()

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

    # --- state -----------------------------------------------------------------------------------

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

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export everything, by the names of `named_parameters`, and JSON-able facts beside it.

        The tensors share memory with the live parameters: write or copy them before the next step.
        """
        tensors = {name: p.detach() for name, p in self.named_parameters().items()}
        facts = {
            "seed": self.seed,
            "section": self.section.flat(),
            "clients": [[client_id, size] for client_id, size in self._sizes.items()],
            "groups": dict(self._keys),
            "heads": {key: group.num_chunks for key, group in self.groups.items()},
        }
        return tensors, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state into this hypernetwork, which must have no clients yet.

        Raises CheckpointError where it has, where its shape differs, or a tensor does not fit.
        """
        if self._sizes:
            raise CheckpointError(
                "a state is loaded into an empty hypernetwork; this one has clients "
                f"{listing(self._sizes)}. Make a new one."
            )
        require_same(facts["section"], self.section.flat(), SHAPE_KEYS)

        def own(name: str, *shape: int) -> Tensor:
            return required_tensor(tensors, name, shape).detach().to(self.device, copy=True)

        s, self.seed = self.section, int(facts["seed"])
        for name, parameter in self.trunk.named_parameters():
            parameter.data.copy_(own(f"trunk.{name}", *parameter.shape))
        for key, count in facts["heads"].items():
            weight = own(f"heads.{key}.weight", count, s.hidden_dim, s.chunk_size)
            self.groups[key] = HeadGroup(weight, own(f"heads.{key}.bias", count, s.chunk_size))
        for client_id, size in facts["clients"]:
            rows = own(f"embeddings.{client_id}", num_chunks(size, s.chunk_size), s.embed_dim)
            self.embeddings[client_id] = nn.Parameter(rows)
            self._sizes[client_id], self._keys[client_id] = size, facts["groups"][client_id]

    def _require(self, client_id: str) -> None:
        if client_id not in self._sizes:
            raise RegistrationError(
                f"no embedding for client {client_id!r}; call add_client first. "
                f"Known: {listing(self._sizes) or 'nobody'}."
            )


def by_chunk(rows_RH: Tensor, num_clients: int) -> Tensor:
    """View rows of clients one after the other (N C, H) as (C, N, H)."""
    return rows_RH.view(num_clients, -1, rows_RH.shape[1]).transpose(0, 1)


def blocks(client_ids: Sequence[str], size_of: Callable[[str], int]) -> Iterator[Sequence[str]]:
    """Cut clients into runs that are generated together: float32 within `BLOCK_BYTES`.

    Only the list and the sizes decide, so that two runs make the same products. The runs are of
    nearly equal length: a product of one or two rows takes another path through the BLAS.
    """
    if not client_ids:
        return
    largest = 4 * max(map(size_of, client_ids))
    most = min(BLOCK_CLIENTS, max(LEAST_CLIENTS, BLOCK_BYTES // largest))
    count = -(-len(client_ids) // most)
    edges = [len(client_ids) * i // count for i in range(count + 1)]
    for first, stop in pairwise(edges):
        yield client_ids[first:stop]


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
