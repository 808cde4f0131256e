"""The hypernetwork: per-client embeddings, one trunk, and heads shared by clients of equal size.

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
from server_app.checkpoint import require_same, required_tensor
from server_app.grouping import by_num_chunks, members_by_group, num_chunks
from server_app.heads import HeadGroup, HeadPullback
from server_app.least_squares import GroupBatch
from server_app.memory import Scratch
from server_app.parts import Part, spread_gradient, stacked_rows
from server_app.pulls import Pull, Pullback, check_pulls, delta_facts, step_norm
from server_app.shared_heads import SharedHead, place_rows
from server_app.trunk import draw_trunk

HeadRule = Callable[[GroupBatch, Scratch], HeadPullback]
"""Moves the heads of one group and returns what the trunk is to learn from."""

SHAPE_KEYS = ("chunk-size", "embed-dim", "hidden-dim", "trunk-layers", "head-layout")


class Hypernetwork:
    """Generate client parameters and pull pseudo-gradients back; clients come and go any time.

    What a client or group starts from depends on the seed and its own id or size alone, not on
    the order of arrival. Drawn on the CPU, so it does not depend on the device either.

    Attributes
    ----------
    trunk : Linear(E, H), ReLU, then Linear(H, H), ReLU as often as `trunk_layers` says.
    groups : head groups by key (number of chunks).
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
        self.groups: dict[int, HeadGroup] = {}
        self.embeddings: dict[str, nn.Parameter] = {}
        self._sizes: dict[str, int] = {}
        self._scratch = Scratch(self.device)
        self._short = section.generation_precision == "bfloat16"
        self._one_head = section.head_layout == "one"

    def add_client(self, client_id: str, num_parameters: int) -> None:
        """Give a client an embedding, and its size a head group where none exists yet.

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
        chunks = num_chunks(num_parameters, self.section.chunk_size)
        generator = torch_generator(self.seed, "embedding", client_id=client_id)
        rows = torch.randn(chunks, self.section.embed_dim, generator=generator)
        rows *= self.section.embedding_std
        if self._one_head:
            rows += place_rows(chunks, rows.shape[1], torch_generator(self.seed, "places"))
        self._sizes[client_id] = num_parameters
        self.embeddings[client_id] = nn.Parameter(rows.to(self.device))
        key = self.group_key(client_id)
        if key not in self.groups:
            self.groups[key] = self._draw_group(key)

    def _draw_group(self, key: int) -> HeadGroup:
        """Make a head group; what it starts from depends on the seed and its key alone."""
        draw = SharedHead.draw_one if self._one_head else HeadGroup.draw
        group = draw(
            num_chunks=key,
            chunk_size=self.section.chunk_size,
            hidden_dim=self.section.hidden_dim,
            generator=torch_generator(self.seed, f"head/{key}"),
        ).to(self.device)
        if self.section.head_init != "torch":
            group.weight.data.zero_()
        if self.section.head_init == "zero":
            group.bias.data.zero_()
        return group

    def remove_client(self, client_id: str) -> None:
        """Forget a client's embedding; its head group stays, for it holds what others learned."""
        self._require(client_id)
        del self._sizes[client_id], self.embeddings[client_id]

    def has_client(self, client_id: str) -> bool:
        """Whether the client owns an embedding."""
        return client_id in self._sizes

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
        parts = self._parts([client_id for client_id in client_ids if client_id not in thetas])
        if parts:
            features_RH = self.trunk(stacked_rows(parts, self.embeddings))
            for part in parts:
                sizes = [self._sizes[client_id] for client_id in part.client_ids]
                emitted = part.group.forward(
                    part.chunk_major(features_RH), sizes, bfloat16=self._short
                )
                thetas |= zip(part.client_ids, emitted, strict=True)
        return {client_id: thetas[client_id] for client_id in client_ids}

    def _held(self, client_ids: Sequence[str]) -> dict[str, Tensor]:
        """Copy theta of those whose head group keeps a ledger of it."""
        thetas: dict[str, Tensor] = {}
        for part in self._parts(client_ids):
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
        for part in self._parts([pull.client_id for pull in pulls]):
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
        parts = self._parts([pull.client_id for pull in pulls])
        rows_RE = stacked_rows(parts, self.embeddings).requires_grad_()
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
        embeddings = spread_gradient(rows_gradient, parts, self.embeddings)
        norm = step_norm(pulled, [*trunk, *embeddings])
        return Pullback(trunk + heads, embeddings, norm, *delta_facts(pulls, pulled))

    def _group_batch(
        self, part: Part, deltas: Sequence[Tensor], shares: Tensor, *, fixed: bool = False
    ) -> GroupBatch:
        """Put a part beside all clients of its group, known by the group's key."""
        key = self.group_key(part.client_ids[0])
        members = sorted(c for c in self._sizes if self.group_key(c) == key)
        with torch.no_grad():
            features_RH = self.trunk(torch.cat([self.embeddings[c].detach() for c in members]))
        return GroupBatch(
            key=key,
            group=part.group,
            members=members,
            features_CNH=features_RH.view(len(members), key, -1).transpose(0, 1),
            rows=[members.index(c) for c in part.client_ids],
            deltas=deltas,
            shares=shares,
            fixed=fixed,
        )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return phi and all embeddings by name.

        `trunk.<layer>.weight`, `heads.<num_chunks>.weight` (C, H, S), `heads.<num_chunks>.bias`
        (C, S), `embeddings.<client_id>` (C, E).
        """
        named = {f"trunk.{name}": p for name, p in self.trunk.named_parameters()}
        for key in sorted(self.groups):
            named[f"heads.{key}.weight"] = self.groups[key].weight
            named[f"heads.{key}.bias"] = self.groups[key].bias
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
            "groups": sorted(self.groups),
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
        saved = {"head-layout": "separate", **meta["section"]}  # older ones do not say
        require_same(saved, self.section.flat(), SHAPE_KEYS)
        self.seed = int(meta["seed"])
        s = self.section
        for name, parameter in self.trunk.named_parameters():
            shape = tuple(parameter.shape)
            parameter.data.copy_(required_tensor(tensors, f"trunk.{name}", shape))
        for key in map(int, meta["groups"]):
            heads, name = 1 if self._one_head else key, f"heads.{key}"
            shape = (heads, s.hidden_dim, s.chunk_size)
            weight = self._own(required_tensor(tensors, f"{name}.weight", shape))
            bias = self._own(required_tensor(tensors, f"{name}.bias", (heads, s.chunk_size)))
            one = self._one_head
            self.groups[key] = SharedHead(weight, bias, key) if one else HeadGroup(weight, bias)
        for client_id, size in meta["clients"]:
            shape = (num_chunks(size, s.chunk_size), s.embed_dim)
            rows = required_tensor(tensors, f"embeddings.{client_id}", shape)
            self.embeddings[client_id] = nn.Parameter(self._own(rows))
            self._sizes[client_id] = int(size)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=self.device, copy=True)

    def group_key(self, client_id: str) -> int:
        """Return the key of a client's head group in `groups`."""
        return by_num_chunks(self.num_parameters(client_id), self.section.chunk_size)

    def _require(self, *client_ids: str) -> None:
        unknown = [client_id for client_id in client_ids if client_id not in self._sizes]
        if unknown:
            raise RegistrationError(
                f"no embedding for client {listing(map(repr, unknown))}; call add_client first. "
                f"Known: {listing(self._sizes) or 'nobody'}."
            )

    def _parts(self, client_ids: Sequence[str]) -> list[Part]:
        """Split clients by head group; their rows are stacked in the order of the parts."""
        parts: list[Part] = []
        first = 0
        for key, positions in members_by_group(client_ids, self.group_key).items():
            stop = first + key * len(positions)
            ids = [client_ids[i] for i in positions]
            parts.append(Part(self.groups[key], positions, ids, slice(first, stop)))
            first = stop
        return parts
