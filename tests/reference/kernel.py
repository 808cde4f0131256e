"""The default rule of the server, slowly and clearly: float64, plain loops over clients.

Independent of the system: nothing is imported from it; the sketch is given as places and signs.
With n updates of a group of N clients, p = min(1, n / N), weights w_i that sum to 1, and
beta = max(0, min(1 - 5 / N, t / (t + 3))) after t steps:

    m_now = sum_i w_i delta_i        m <- m + p (m_now - m)        u <- beta^p u + p m_now
    b <- b - min(1, g p) f (m_now + beta^p u)
    for each update i:   a_i <- a_i - r f n w_i (delta_i - m)
                         v_i <- v_i + sketch(delta_i) - median_j sketch(newest delta_j)

    theta_i = b + sum_j K_ij a_j,  K_ij = k_ij / sum_l k_il,  k_ij = max(0, cos(v_i, v_j))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor


@dataclass
class ReferenceGroup:
    """One head group; `sizes` are those of its clients, `width` the most that one can have."""

    width: int
    places: list[int]
    signs: list[float]
    embed_dim: int
    rho: float = 0.2
    shared_gain: float = 1.0
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = torch.zeros(self.width, dtype=torch.float64)
        self.velocity = torch.zeros_like(self.base)
        self.steps = 0
        self.mean: Tensor | None = None
        self.own: dict[str, Tensor] = {}
        self.embeddings: dict[str, Tensor] = {}
        self.newest: dict[str, Tensor] = {}

    def add_client(self, client_id: str, size: int) -> None:
        self.sizes[client_id] = size
        self.own[client_id] = torch.zeros_like(self.base)
        self.embeddings[client_id] = torch.zeros(self.embed_dim, dtype=torch.float64)

    def remove_client(self, client_id: str) -> None:
        for known in (self.sizes, self.own, self.embeddings, self.newest):
            del known[client_id]

    def likeness(self, a: str, b: str) -> float:
        if a == b:
            return 1.0
        v, w = self.embeddings[a], self.embeddings[b]
        if not float(v.norm()) or not float(w.norm()):
            return 0.0
        return max(0.0, float(v @ w / (v.norm() * w.norm())))

    def theta(self, client_id: str) -> Tensor:
        rows = {other: self.likeness(client_id, other) for other in self.sizes}
        total = sum(rows.values())
        theta = self.base.clone()
        for other, row in rows.items():
            theta += row / total * self.own[other]
        return theta[: self.sizes[client_id]]

    def step(
        self,
        updates: list[tuple[str, Tensor, float]],
        *,
        factor: float = 1.0,
        is_global: bool = False,
        frozen: bool = False,
    ) -> None:
        n, count = len(updates), len(self.sizes)
        part, total = min(1.0, n / count), sum(weight for _, _, weight in updates)
        beta = max(0.0, min(1 - 5 / count, self.steps / (self.steps + 3))) ** part
        gain = 1.0 if is_global else self.rho + (1 - self.rho) / count
        now = torch.zeros_like(self.base)
        for _, delta, weight in updates:
            now += weight / total * self.padded(delta)
        if self.mean is None:
            self.mean = now.clone()
        if not frozen:
            self.mean = self.mean + part * (now - self.mean)
            self.velocity = beta * self.velocity + part * now
            shared = now + beta * self.velocity
            self.base = self.base - min(1.0, self.shared_gain * part) * factor * shared
            self.steps += 1
        for client_id, delta, weight in updates:
            size = self.sizes[client_id]
            own = delta.double() - self.mean[:size]
            if not frozen:
                self.own[client_id][:size] -= gain * factor * n * weight / total * own
        if is_global:
            return
        if not frozen:
            self.newest |= {client_id: self.sketch(delta) for client_id, delta, _ in updates[::-1]}
        for client_id, delta, _ in updates:
            moved = self.sketch(delta) - (0 if frozen else self.usual())
            self.embeddings[client_id] = self.embeddings[client_id] + moved

    def usual(self) -> Tensor:
        columns = torch.stack([*self.newest.values()]).T.tolist()
        return torch.tensor([median(column) for column in columns], dtype=torch.float64)

    def sketch(self, change: Tensor) -> Tensor:
        kept = torch.zeros(self.embed_dim, dtype=torch.float64)
        for from_end in range(1, min(len(change), len(self.places)) + 1):
            kept[self.places[-from_end]] += self.signs[-from_end] * change[-from_end]
        return kept

    def padded(self, delta: Tensor) -> Tensor:
        padded = torch.zeros_like(self.base)
        padded[: len(delta)] = delta.double()
        return padded
