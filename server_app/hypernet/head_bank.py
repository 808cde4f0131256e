"""All head groups of a hypernetwork, and which client uses which.

Groups are made when their first client comes. What a group starts from depends on the seed and its
key alone; a group that is replaced by a larger one, or copied when it is split, leaves an `Heir`,
by which the optimiser hands its state on (`server_app.aggregation.inherit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import HypernetSection
from common.seeding import torch_generator
from server_app.hypernet.groups import ALL, group_order, num_chunks, place
from server_app.hypernet.heads import HeadGroup
from server_app.output.checkpoint import required_tensor


@dataclass(frozen=True)
class Heir:
    """A head group that goes on from where another one is: a larger one, or a copy."""

    old_key: str
    new_key: str
    old: HeadGroup
    new: HeadGroup


class HeadBank:
    """Head groups by key, and the key of every client.

    Attributes
    ----------
    groups : head groups by key; see `server_app.hypernet.groups`.
    """

    def __init__(self, section: HypernetSection, device: torch.device) -> None:
        self.groups: dict[str, HeadGroup] = {}
        self._section = section
        self._device = device
        self._keys: dict[str, str] = {}
        self._heirs: list[Heir] = []

    def assign(self, client_id: str, chunks: int, tag: str, *, seed: int) -> None:
        """Give a client its group; make the group, or make it larger, where that is needed."""
        key, heads = place(self._section, client_id, chunks, tag)
        self._keys[client_id] = key
        known = self.groups.get(key)
        if known is None or known.num_chunks < heads:
            self.groups[key] = self._draw(key, heads, seed)
        if known is not None and known.num_chunks < heads:
            self._take_over(key, known)

    def release(self, client_id: str) -> None:
        """Forget a client; its group stays, for it holds what others learned."""
        self.groups[self._keys[client_id]].settle()
        del self._keys[client_id]

    def key(self, client_id: str) -> str:
        """Return the key of a client's group."""
        return self._keys[client_id]

    def members(self, key: str) -> list[str]:
        """Return the clients of a group, sorted."""
        return sorted(client_id for client_id, own in self._keys.items() if own == key)

    def take_heirs(self) -> list[Heir]:
        """Return, once, the groups that go on from another."""
        heirs, self._heirs = self._heirs, []
        return heirs

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return `heads.<key>.weight` (C, H, S) and `heads.<key>.bias` (C, S)."""
        return {
            f"heads.{key}.{part}": getattr(self.groups[key], part)
            for key in sorted(self.groups, key=group_order)
            for part in ("weight", "bias")
        }

    def facts(self) -> dict[str, Any]:
        """Return JSON-able facts: the groups with their numbers of chunks, everybody's key."""
        counts = {key: self.groups[key].num_chunks for key in sorted(self.groups, key=group_order)}
        return {"groups": list(counts), "heads": counts, "keys": dict(self._keys)}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the groups and keys of a saved hypernetwork; raises CheckpointError.

        Older ones know the criterion "chunks" alone: their keys are numbers of chunks.
        """
        s = self._section
        for key in map(str, meta["groups"]):
            chunks = int(meta["heads"][key] if "heads" in meta else key)
            shape = (chunks, s.hidden_dim, s.chunk_size)
            weight = required_tensor(tensors, f"heads.{key}.weight", shape)
            bias = required_tensor(tensors, f"heads.{key}.bias", (chunks, s.chunk_size))
            own_weight = weight.detach().to(device=self._device, copy=True)
            own_bias = bias.detach().to(device=self._device, copy=True)
            self.groups[key] = self._make(own_weight, own_bias, chunks)
        self._keys = meta.get("keys") or {
            client_id: str(num_chunks(size, s.chunk_size)) for client_id, size in meta["clients"]
        }

    def _draw(self, key: str, heads: int, seed: int) -> HeadGroup:
        """Make a head group; what it starts from depends on the seed and its key alone."""
        if key == ALL:  # chunk by chunk: a group that grows is as if it had been so large at once
            drawn = [self._draw_heads(1, seed, f"head/{key}/{i}") for i in range(heads)]
            group = HeadGroup(
                torch.cat([one.weight.detach() for one in drawn]),
                torch.cat([one.bias.detach() for one in drawn]),
            )
        else:
            group = self._draw_heads(heads, seed, f"head/{key}")
        group = group.to(self._device)
        if self._section.head_init != "torch":
            group.weight.data.zero_()
        if self._section.head_init == "zero":
            group.bias.data.zero_()
        return group

    def _draw_heads(self, heads: int, seed: int, purpose: str) -> HeadGroup:
        return HeadGroup.draw(
            num_chunks=heads,
            chunk_size=self._section.chunk_size,
            hidden_dim=self._section.hidden_dim,
            generator=torch_generator(seed, purpose),
        )

    def _take_over(self, key: str, old: HeadGroup) -> None:
        """Let a larger group go on from the smaller one it replaces."""
        new = self.groups[key]
        new.weight.data[: old.num_chunks] = old.weight.detach()
        new.bias.data[: old.num_chunks] = old.bias.detach()
        self._heirs.append(Heir(key, key, old, new))

    def _make(self, weight: Tensor, bias: Tensor, chunks: int) -> HeadGroup:
        return HeadGroup(weight, bias)
