"""What every hypernetwork knows of its clients: sizes, head groups, embeddings; and no update rule.

Two generate parameters: the published one (`network`: trunk and linear heads) and one in dual form
(`kernel`). Sizes are known here, never an architecture.

Shapes: P parameters of a client (the paper's K_i).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from common.compression import Float32
from common.config import HypernetSection
from common.errors import CheckpointError, RegistrationError, listing
from common.serialization import require_same, required_tensor
from server_app.hypernet.groups import GroupDeltas, head_group, members_by_group, num_chunks

BLOCK_CLIENTS = 256
BLOCK_BYTES = 256 * 2**20
LEAST_CLIENTS = 8
"""A block never has fewer for its size alone: reading the heads of 11 M parameters costs more."""


class Group(Protocol):
    """What is shared by the clients of one head group."""

    @property
    def num_chunks(self) -> int:
        """C, the largest number of chunks of a client."""


class Network(ABC):
    """Generates the parameters of clients, who come and go at any time.

    What a client or group starts from depends on the seed and its own id or key alone, not on the
    order of arrival. It is drawn on the CPU, so it does not depend on the device either.

    Attributes
    ----------
    groups : head groups by key; see `server_app.hypernet.groups.head_group`.
    embeddings : v_i by client_id.
    shape_keys : of the section, which a saved state must agree in.
    """

    shape_keys: Sequence[str]
    groups: Mapping[str, Group]
    embeddings: Mapping[str, Tensor]

    def __init__(
        self, section: HypernetSection, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.section = section
        self.seed = seed
        self.device = torch.device(device)
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
        key, heads = head_group(s, client_id, chunks, tag)
        if group:
            key, heads = f"{chunks}-{group}", chunks
        self._sizes[client_id], self._keys[client_id] = num_parameters, key
        self._embed(client_id, key, heads)

    @abstractmethod
    def _embed(self, client_id: str, key: str, num_heads: int) -> None:
        """Start a client's embedding, and its group where that is new."""

    def remove_client(self, client_id: str) -> None:
        """Forget what is a client's own; its head group stays (`Rule.free_unused`)."""
        self._require(client_id)
        del self._sizes[client_id], self._keys[client_id]
        self._forget(client_id)

    @abstractmethod
    def _forget(self, client_id: str) -> None:
        """Drop a client's embedding, and what else is its own."""

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

    def num_sharing(self, key: str, sending: Collection[str] = ()) -> int:
        """Count who shares in a head group; 0 where each client keeps to itself what it learns.

        Of `sending` there are deltas at hand.
        """
        return len(self.members(key))

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
            ids = [client_ids[i] for i in positions]
            sizes = [self._entries(client_id, chunks) for client_id in ids]
            thetas |= zip(ids, self._emit(key, ids, sizes, chunks), strict=True)
        return {client_id: thetas[client_id] for client_id in client_ids}

    @abstractmethod
    def _emit(
        self, key: str, ids: Sequence[str], sizes: Sequence[int], chunks: Sequence[int] | None
    ) -> list[Tensor]:
        """Generate for clients of one group: so many entries of each, of some chunks or of all."""

    def thetas(self, client_ids: Sequence[str]) -> Iterator[tuple[str, Float32]]:
        """Generate as `generate`, as numpy, a block of clients at a time, when it is asked for."""
        for block in self.blocks(client_ids):
            for client_id, theta in self.generate(block).items():
                yield client_id, theta.cpu().numpy()

    def blocks(self, client_ids: Sequence[str]) -> Iterator[Sequence[str]]:
        """Cut clients into runs that are generated together."""
        return blocks(client_ids, self.num_parameters)

    def _entries(self, client_id: str, chunks: Sequence[int] | None) -> int:
        """Count the parameters of a client that lie in some chunks; in all of them for None."""
        total, size = self.num_parameters(client_id), self.section.chunk_size
        if chunks is None:
            return total
        return sum(min(size, max(0, total - size * j)) for j in chunks)

    # --- state -----------------------------------------------------------------------------------

    @abstractmethod
    def named_parameters(self) -> Mapping[str, Tensor]:
        """Return everything that is learned by name; embeddings are `embeddings.<client_id>`."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export everything, by the names of `named_parameters`, and JSON-able facts beside it.

        The tensors share memory with the live parameters: write or copy them before the next step.
        """
        tensors = {name: x.detach() for name, x in self.named_parameters().items()}
        facts = {
            "seed": self.seed,
            "section": self.section.flat(),
            "clients": [[client_id, size] for client_id, size in self._sizes.items()],
            "groups": dict(self._keys),
            "heads": {key: group.num_chunks for key, group in self.groups.items()},
        }
        return tensors, facts | self._facts()

    def _facts(self) -> dict[str, Any]:
        """Return what else has to be saved."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore an exported state into this hypernetwork, which must have no clients yet.

        Raises CheckpointError where it has, where its shape differs, or a tensor does not fit.
        """
        if self._sizes:
            raise CheckpointError(
                "a state is loaded into an empty hypernetwork; this one has clients "
                f"{listing(self._sizes)}. Make a new one."
            )
        require_same(facts["section"], self.section.flat(), self.shape_keys)

        def own(name: str, *shape: int) -> Tensor:
            return required_tensor(tensors, name, shape).detach().to(self.device, copy=True)

        self.seed = int(facts["seed"])
        for client_id, size in facts["clients"]:
            self._sizes[client_id], self._keys[client_id] = size, facts["groups"][client_id]
        self._restore(own, facts)

    @abstractmethod
    def _restore(self, own: Callable[..., Tensor], facts: Mapping[str, Any]) -> None:
        """Load groups and embeddings; `own(name, *shape)` is a copy of a saved tensor."""

    def _require(self, client_id: str) -> None:
        if client_id not in self._sizes:
            raise RegistrationError(
                f"no embedding for client {client_id!r}; call add_client first. "
                f"Known: {listing(self._sizes) or 'nobody'}."
            )


def by_group(
    hypernet: Network,
    client_ids: Sequence[str],
    deltas: Sequence[Tensor],
    shares: Sequence[float],
) -> list[GroupDeltas]:
    """Split the deltas of a step by head group; raise ValueError at one of another size."""
    for client_id, delta in zip(client_ids, deltas, strict=True):
        shape, expected = tuple(delta.shape), (hypernet.num_parameters(client_id),)
        if shape != expected:
            raise ValueError(
                f"delta of client {client_id!r} has shape {shape}; its theta has {expected}."
            )
    device = hypernet.device
    return [
        GroupDeltas(
            key=key,
            width=hypernet.groups[key].num_chunks * hypernet.section.chunk_size,
            client_ids=[client_ids[i] for i in positions],
            deltas=[deltas[i].to(device) for i in positions],
            shares=torch.tensor([shares[i] for i in positions], device=device),
        )
        for key, positions in members_by_group(client_ids, hypernet.group_key).items()
    ]


def blocks(
    client_ids: Sequence[str], size_of: Callable[[str], int], least: int = LEAST_CLIENTS
) -> Iterator[Sequence[str]]:
    """Cut clients into runs of float32 within `BLOCK_BYTES`, or of `least` clients.

    Only the list and the sizes decide, so that two runs make the same products. The runs are of
    nearly equal length: a product of one or two rows takes another path through the BLAS.
    """
    if not client_ids:
        return
    largest = 4 * max(map(size_of, client_ids))
    most = min(BLOCK_CLIENTS, max(least, BLOCK_BYTES // largest))
    count = -(-len(client_ids) // most)
    edges = [len(client_ids) * i // count for i in range(count + 1)]
    for first, stop in pairwise(edges):
        yield client_ids[first:stop]
