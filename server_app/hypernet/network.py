"""The hypernetwork: per-client embeddings, one trunk, and heads shared by groups of clients.

Client i owns an embedding v_i with one row a chunk. The trunk turns rows into features and head j
of the client's group turns the features of row j into chunk j of theta_i (paper section 3.2;
method.md, "Hypernetwork"). Only sizes are known here, never an architecture.

Shapes: N clients, C chunks of a client, S chunk size, E embedding size, H hidden size, P parameters
of a client (the paper's K_i), R rows of several embeddings put one after the other.
"""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.config import HypernetSection
from common.errors import CheckpointError, RegistrationError, listing
from common.seeding import torch_generator
from server_app.aggregation.least_squares import GroupBatch
from server_app.hypernet.groups import num_chunks, place
from server_app.hypernet.head_bank import HeadBank
from server_app.hypernet.heads import HeadGroup, HeadPullback
from server_app.hypernet.memory import Scratch
from server_app.hypernet.parts import Part, parts_of, spread_rows, stack_rows
from server_app.hypernet.pulls import Pull, Pullback, check_pulls, delta_facts, step_norm
from server_app.hypernet.trunk import draw_trunk
from server_app.output.checkpoint import require_same, required_tensor

HeadRule = Callable[[GroupBatch, Scratch], HeadPullback]
"""Moves the heads of one group and returns what the trunk is to learn from."""

SHAPE_KEYS = (
    "chunk-size", "embed-dim", "hidden-dim", "head-sharing",
)  # fmt: skip


class Hypernetwork:
    """Generate client parameters and pull pseudo-gradients back; clients come and go any time.

    What a client or group starts from depends on the seed and its own id or size alone, not on
    the order of arrival. Drawn on the CPU, so it does not depend on the device either.

    Attributes
    ----------
    trunk : Linear(E, H), ReLU, then Linear(H, H), ReLU twice.
    bank : head groups by key, and who uses which.
    embeddings : v_i (C_i, E) by client_id.
    """

    def __init__(
        self,
        section: HypernetSection,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.section = section
        self.seed = seed
        self.device = torch.device(device)
        self.trunk = draw_trunk(section, torch_generator(seed, "trunk")).to(self.device)
        self.bank = HeadBank(section, self.device)
        self.embeddings: dict[str, nn.Parameter] = {}
        self._sizes: dict[str, int] = {}
        self._scratch = Scratch(self.device)

    def add_client(self, client_id: str, num_parameters: int, *, tag: str = "") -> None:
        """Give a client an embedding and a head group, an old or a new one.

        Parameters
        ----------
        tag : what it declared; it counts where `head-sharing = "tag"`.

        Raises
        ------
        RegistrationError
            The client is known already, or its size is outside 1..max-parameters.
        """
        if client_id in self._sizes:
            raise RegistrationError(
                f"client {client_id!r} has an embedding for {self._sizes[client_id]} parameters "
                "already. Remove it first when the client changed its model."
            )
        cap = self.section.max_parameters
        if not 1 <= num_parameters <= cap:
            raise RegistrationError(
                f"client {client_id!r} asks for {num_parameters} parameters; 1 to {cap} are "
                "allowed. Use a smaller model, or raise max-parameters in the run config."
            )
        self._sizes[client_id] = num_parameters
        self.embeddings[client_id] = nn.Parameter(self._start(client_id).to(self.device))
        self.bank.assign(client_id, self.num_chunks(client_id), tag, seed=self.seed)

    def _start(self, client_id: str) -> Tensor:
        """Draw the rows (C, E) that a client's embedding starts from."""
        shape = (self.num_chunks(client_id), self.section.embed_dim)
        generator = torch_generator(self.seed, "embedding", client_id=client_id)
        rows = torch.randn(*shape, generator=generator) * self.section.embedding_std
        return rows

    def remove_client(self, client_id: str) -> None:
        """Forget a client's embedding; its head group stays, for it holds what others learned."""
        self._require(client_id)
        self.bank.release(client_id)
        del self._sizes[client_id], self.embeddings[client_id]

    @property
    def groups(self) -> dict[str, HeadGroup]:
        """Head groups by key."""
        return self.bank.groups

    def has_client(self, client_id: str) -> bool:
        """Whether the client owns an embedding."""
        return client_id in self._sizes

    def is_same(self, client_id: str, num_parameters: int, tag: str) -> bool:
        """Whether a known client still has this size, and this tag where tags count."""
        same_size = self.num_parameters(client_id) == num_parameters
        if self.section.head_sharing != "tag" or not same_size:
            return same_size
        chunks = self.num_chunks(client_id)
        return self.bank.key(client_id) == place(self.section, client_id, chunks, tag)[0]

    def clients(self) -> list[str]:
        """Return the known client_ids in order of arrival."""
        return list(self._sizes)

    def num_parameters(self, client_id: str) -> int:
        """Return P, the paper's K_i, of a known client."""
        self._require(client_id)
        return self._sizes[client_id]

    def num_chunks(self, client_id: str) -> int:
        """Return C, the paper's tau_i, of a known client."""
        return num_chunks(self.num_parameters(client_id), self.section.chunk_size)

    def group_key(self, client_id: str) -> str:
        """Return the key of a known client's head group."""
        self._require(client_id)
        return self.bank.key(client_id)

    @torch.no_grad()
    def generate(self, client_ids: Sequence[str]) -> dict[str, Tensor]:
        """Generate theta_i = h(v_i; phi) for several clients, one batched product per head group.

        Returns
        -------
        dict of client_id to theta (P_i,), float32, on `device`, in the order asked for; they do
        not overlap, but those of one head group share a block of memory.

        Raises
        ------
        RegistrationError
            A client is not known.
        """
        self._require(*client_ids)
        thetas = self._held(client_ids)
        parts = parts_of([c for c in client_ids if c not in thetas], self.bank)
        if parts:
            features_RH = self.trunk(stack_rows(parts, self.embeddings))
            for part in parts:
                sizes = [self._sizes[client_id] for client_id in part.client_ids]
                emitted = part.group.forward(part.chunk_major(features_RH), sizes)
                thetas |= zip(part.client_ids, emitted, strict=True)
        return {client_id: thetas[client_id] for client_id in client_ids}

    def _held(self, client_ids: Sequence[str]) -> dict[str, Tensor]:
        """Return theta of those whose head group keeps a ledger of it."""
        thetas: dict[str, Tensor] = {}
        for part in parts_of(client_ids, self.bank):
            ledger = part.group.ledger
            if ledger is not None:
                known = [c for c in part.client_ids if ledger.holds(c)]
                emitted = ledger.emit(known, [self._sizes[c] for c in known])
                thetas |= zip(known, emitted, strict=True)
        return thetas

    def lead(self, pulls: Sequence[Pull], head_rule: HeadRule) -> Pullback:
        """Let a rule move the heads along deltas; trunk and embeddings stand still for good.

        Raises as `backward`.
        """
        self._require(*(pull.client_id for pull in pulls))
        check_pulls(pulls, self._sizes)
        moved: list[HeadPullback] = []
        for part in parts_of([pull.client_id for pull in pulls], self.bank):
            mine = [pulls[i] for i in part.positions]
            shares = torch.tensor([pull.share for pull in mine], device=self.device)
            batch = self._group_batch(part, [pull.delta for pull in mine], shares, fixed=True)
            moved.append(head_rule(batch, self._scratch))
        rms_delta, coherence = delta_facts(pulls, moved)
        return Pullback(
            [], [], 0.0 if math.isfinite(rms_delta) else rms_delta, rms_delta, coherence
        )

    def backward(self, pulls: Sequence[Pull], *, head_rule: HeadRule | None = None) -> Pullback:
        """Compute sum_i share_i J_i^T delta_i at the current phi, as `grad` of what took part.

        The heads of a group get the mean over that group's clients (shares made to sum to 1 within
        the group), trunk and embeddings the sum with the shares as given. One client alone with
        share 1 gives the published J_i^T delta_i. Any `grad` of an earlier call is replaced. A
        client may appear more than once (two of its replies in one buffer). A `head_rule` moves the
        heads itself, in this call: then they are not among the parameters that take part.

        Raises
        ------
        RegistrationError
            A client is not known.
        ValueError
            There is no pull, a share is not positive, or a delta has not its client's size.
        """
        self._require(*(pull.client_id for pull in pulls))
        check_pulls(pulls, self._sizes)
        parts = parts_of([pull.client_id for pull in pulls], self.bank)
        rows_RE = stack_rows(parts, self.embeddings).requires_grad_()
        with torch.enable_grad():
            features_RH = self.trunk(rows_RE)
        gradient_RH = torch.empty_like(features_RH)
        heads: list[nn.Parameter] = []
        pulled: list[HeadPullback] = []
        for part in parts:
            mine = [pulls[i] for i in part.positions]
            deltas = [pull.delta for pull in mine]
            shares = torch.tensor([pull.share for pull in mine], device=self.device)
            if head_rule is None:
                features_CNH = part.chunk_major(features_RH.detach())
                result = part.group.backward(features_CNH, deltas, shares, scratch=self._scratch)
                heads += [part.group.weight, part.group.bias]
            else:
                result = head_rule(self._group_batch(part, deltas, shares), self._scratch)
            part.chunk_major(gradient_RH).copy_(result.features_CNH)
            pulled.append(result)
        trunk = list(self.trunk.parameters())
        *gradients, rows_gradient = torch.autograd.grad(features_RH, [*trunk, rows_RE], gradient_RH)
        for parameter, gradient in zip(trunk, gradients, strict=True):
            parameter.grad = gradient
        embeddings = spread_rows(rows_gradient, parts, self.embeddings)
        norm = step_norm(pulled, [*trunk, *embeddings])
        return Pullback(trunk + heads, embeddings, norm, *delta_facts(pulls, pulled))

    def _group_batch(
        self, part: Part, deltas: Sequence[Tensor], shares: Tensor, *, fixed: bool = False
    ) -> GroupBatch:
        """Put a part beside all clients of its group, known by the group's key."""
        key = self.bank.key(part.client_ids[0])
        members = self.bank.members(key)
        everybody = Part(part.group, range(len(members)), members, slice(None))
        with torch.no_grad():
            features_RH = self.trunk(stack_rows([everybody], self.embeddings))
        return GroupBatch(
            key=key,
            group=part.group,
            members=members,
            features_CNH=everybody.chunk_major(features_RH),
            rows=[members.index(c) for c in part.client_ids],
            deltas=deltas,
            shares=shares,
            fixed=fixed,
        )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return phi and all embeddings by name.

        `trunk.<layer>.weight`, `heads.<key>.weight` (C, H, S), `heads.<key>.bias` (C, S),
        `embeddings.<client_id>` (C, E).
        """
        named = {f"trunk.{name}": p for name, p in self.trunk.named_parameters()}
        named |= self.bank.named_parameters()
        named |= {f"embeddings.{client_id}": v for client_id, v in self.embeddings.items()}
        return named

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export everything, by the names of `named_parameters`, and JSON-able facts beside it.

        The tensors share memory with the live parameters: write or copy them before the next step.
        """
        tensors = {name: p.detach() for name, p in self.named_parameters().items()}
        meta = {
            "seed": self.seed,
            "section": self.section.flat(),
            "clients": [[client_id, size] for client_id, size in self._sizes.items()],
            **self.bank.facts(),
        }
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore an exported state into this hypernetwork, which must have no clients yet.

        Raises
        ------
        CheckpointError
            There are clients already, the shape of the hypernetwork differs, or a tensor is
            missing or has another shape.
        """
        if self._sizes:
            raise CheckpointError(
                "a state is loaded into an empty hypernetwork; this one has clients "
                f"{listing(self._sizes)}. Make a new one."
            )
        require_same(meta["section"], self.section.flat(), SHAPE_KEYS)
        self.seed = int(meta["seed"])
        s = self.section
        for name, parameter in self.trunk.named_parameters():
            shape = tuple(parameter.shape)
            parameter.data.copy_(required_tensor(tensors, f"trunk.{name}", shape))
        self.bank.restore(tensors, meta)
        for client_id, size in meta["clients"]:
            shape = (num_chunks(size, s.chunk_size), s.embed_dim)
            rows = required_tensor(tensors, f"embeddings.{client_id}", shape)
            self.embeddings[client_id] = nn.Parameter(self._own(rows))
            self._sizes[client_id] = int(size)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=self.device, copy=True)

    def _require(self, *client_ids: str) -> None:
        unknown = [client_id for client_id in client_ids if client_id not in self._sizes]
        if unknown:
            raise RegistrationError(
                f"no embedding for client {listing(map(repr, unknown))}; call add_client first. "
                f"Known: {listing(self._sizes) or 'nobody'}."
            )
