"""The default rule of the server, slowly and clearly: float64, chunk by chunk, client by client.

Independent of the system: nothing is imported from it. A start comes from it by names and shapes
alone (`Hypernetwork.state_dict`, as for `tests.reference.algorithm`). With n updates of a group of
N clients, p = min(1, n / N) and weights w_i that sum to 1 over the updates:

    m_now = sum_i w_i delta_i        m <- m + p (m_now - m)        u <- beta^p u + p m_now
    b <- b - min(1, g p) (m_now + beta^p u)
    for each update i:   a_i = r n w_i (delta_i - m)
                         W <- W - P_i^T a_i        b <- b + (f_mean . P_i) a_i

P_i is the row of client i of (1 + d) (F F^T + e I)^-1 F over all N clients, F the centred features
and e = d mean_i |F_i|^2. Trunk and embeddings take a step of Adam along J^T delta, with the heads
as they were before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Heads W (C, H, S) and b (C, S) of clients with C chunks; what is remembered of them."""

    weight: Tensor
    bias: Tensor
    clients: list[str] = field(default_factory=list)
    mean: Tensor | None = None
    velocity: Tensor | None = None


@dataclass(frozen=True)
class Gains:
    """The numbers of the rule; None for momentum and personal gain: what fits N and R."""

    shared: float = 1.0
    momentum: float | None = None
    personal: float | None = None
    damping: float = 1e-3
    rounds: float = 60
    server_lr: float = 0.0
    embedding_lr: float = 0.0

    def beta(self, num_clients: int) -> float:
        """beta of a whole pass."""
        fitted = max(0.0, 1 - max(5 / num_clients, 6 / self.rounds))
        return fitted if self.momentum is None else self.momentum

    def own(self, num_clients: int) -> float:
        """r, how much of what is a client's own is followed."""
        fitted = min(1.0, max(1.4 / num_clients, 1.6 / self.rounds))
        return fitted if self.personal is None else self.personal


class ReferenceServer:
    """Embeddings, trunk and heads in float64, and the default rule."""

    def __init__(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], gains: Gains
    ) -> None:
        self.gains = gains
        wide = {name: tensor.double().clone() for name, tensor in tensors.items()}
        self.trunk = [nn.Parameter(t) for name, t in wide.items() if name.startswith("trunk.")]
        self.embeddings: dict[str, nn.Parameter] = {}
        self.sizes: dict[str, int] = {}
        self.groups: dict[int, Group] = {}
        self.adam: dict[int, torch.optim.Adam] = {}
        for name in wide:
            if name.startswith("heads.") and name.endswith(".weight"):
                bias = wide[name.replace("weight", "bias")]
                self.groups[len(bias)] = Group(wide[name], bias)
        for client_id, size in facts["clients"]:
            self.add_client(client_id, size, wide[f"embeddings.{client_id}"])

    def add_client(self, client_id: str, size: int, embedding: Tensor) -> None:
        """Let a client join, with an embedding (C, E), a group that is there or none."""
        self.sizes[client_id] = size
        self.embeddings[client_id] = nn.Parameter(embedding.double().clone())
        self.groups[len(embedding)].clients.append(client_id)

    def features(self, client_id: str) -> Tensor:
        """The trunk's output for every row of an embedding (C, H), with its graph."""
        x = self.embeddings[client_id]
        for weight, bias in zip(self.trunk[::2], self.trunk[1::2], strict=True):
            x = torch.relu(x @ weight.T + bias)
        return x

    def theta(self, client_id: str) -> Tensor:
        """h(v_i; phi) (P_i,), chunk by chunk."""
        group = self.groups[len(self.embeddings[client_id])]
        features = self.features(client_id)
        chunks = [f @ w + b for f, w, b in zip(features, group.weight, group.bias, strict=True)]
        return torch.cat(chunks)[: self.sizes[client_id]]

    def step(
        self,
        updates: Sequence[tuple[str, Tensor, float]],
        *,
        factor: float = 1.0,
        is_global: bool = False,
    ) -> None:
        """Take one step on (client_id, delta, weight); `factor` is the decay of all gains."""
        total = sum(weight for _, _, weight in updates)
        parameters = [*self.trunk, *(self.embeddings[c] for c in sorted({u[0] for u in updates}))]
        loss = sum(w / total * (self.theta(c) @ delta.double()) for c, delta, w in updates)
        gradients = torch.autograd.grad(loss, parameters)
        for count, group in self.groups.items():
            mine = [u for u in updates if len(self.embeddings[u[0]]) == count]
            if mine:
                self._move_heads(group, mine, factor, is_global)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            shared = any(parameter is p for p in self.trunk)
            rate = self.gains.server_lr if shared else self.gains.embedding_lr
            adam = self.adam.setdefault(id(parameter), torch.optim.Adam([parameter]))
            adam.param_groups[0]["lr"] = rate * factor
            parameter.grad = gradient * min(1.0, 50 / float(norm + 1e-6))
            adam.step()

    @torch.no_grad()
    def _move_heads(
        self, group: Group, updates: Sequence[tuple[str, Tensor, float]], factor: float, whole: bool
    ) -> None:
        n, num_clients = len(updates), len(group.clients)
        part = min(1.0, n / num_clients)
        beta = self.gains.beta(num_clients) ** part
        own = factor * (1.0 if whole else self.gains.own(num_clients))
        total = sum(weight for _, _, weight in updates)
        weights = [weight / total for _, _, weight in updates]
        deltas = [self._padded(delta, group) for _, delta, _ in updates]
        now = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
        if group.mean is None:
            group.mean, group.velocity = torch.zeros_like(now), torch.zeros_like(now)
        group.mean = group.mean + part * (now - group.mean)
        group.velocity = beta * group.velocity + part * now
        gain = min(1.0, self.gains.shared * part) * factor
        group.bias = group.bias - gain * (now + beta * group.velocity)
        features = torch.stack([self.features(c) for c in group.clients])  # N, C, H
        for chunk in range(len(group.bias)):
            center = features[:, chunk].mean(0)
            solved = self._ridge(features[:, chunk] - center)
            for (client_id, _, _), weight, delta in zip(updates, weights, deltas, strict=True):
                row = solved[group.clients.index(client_id)]
                asked = own * n * weight * (delta[chunk] - group.mean[chunk])
                group.weight[chunk] -= torch.outer(row, asked)
                group.bias[chunk] += (center @ row) * asked

    def _ridge(self, centred: Tensor) -> Tensor:
        """(1 + d) (F F^T + e I)^-1 F of centred features (N, H) of one chunk."""
        d = self.gains.damping
        e = d * centred.square().sum(1).mean() + 1e-30  # one client alone has no feature to go by
        kernel = centred @ centred.T + e * torch.eye(len(centred), dtype=torch.float64)
        return (1 + d) * torch.linalg.solve(kernel, centred)

    @staticmethod
    def _padded(delta: Tensor, group: Group) -> Tensor:
        padded = torch.zeros(group.bias.numel(), dtype=torch.float64)
        padded[: len(delta)] = delta
        return padded.view_as(group.bias)
