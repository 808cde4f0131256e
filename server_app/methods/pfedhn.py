"""pFedHN (Shamsian et al. 2021, arXiv 2103.04628): a hypernetwork for one architecture.

An embedding of size 1 + N/4 for each of N clients, an MLP of four layers of 100, and a linear head
for every layer of the target model. Heads that share their input are one Linear(100, K) on the
flat parameters, so that the server still knows sizes alone.

Shapes: M clients of one step, E embedding, K parameters of the model.
"""

# ruff: noqa: N806 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.compression import Float32
from common.config import RunConfig
from common.errors import ConfigError, RegistrationError
from common.messages import DELTA, THETA, Registration
from common.records import Arrays, Received, require_norm
from common.seeding import torch_generator
from common.serialization import required_tensor
from server_app.clients import Client
from server_app.methods.base import Exchange, Method, Upload

HIDDEN, LAYERS = 100, 4
CLIP_NORM, MOMENTUM, WEIGHT_DECAY = 50.0, 0.9, 1e-3
ONE = "pfedhn generates the weights of ONE architecture"


class PFedHN(Method[Float32]):
    """Pulls deltas back through the hypernetwork; SGD with momentum on all that took part."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._net: nn.Sequential | None = None
        self._embed_dim = 0
        self._embeddings: dict[str, nn.Parameter] = {}
        self._momenta: dict[str, Tensor] = {}

    @classmethod
    def adapted(cls, config: RunConfig) -> RunConfig:
        """Refuse a run config that names several models."""
        if "," in config.client.models:
            raise ConfigError(
                f"{ONE}, but models = {config.client.models!r}. Name one model, or use "
                "method = 'mh-pfedhn', which has a head group for each size."
            )
        return super().adapted(config)

    def admit(self, registration: Registration, other: Client | None) -> None:
        """Refuse a client whose architecture is not everybody else's."""
        super().admit(registration, other)
        mine = (registration.group, registration.num_parameters)
        if other and (other.group, other.num_parameters) != mine:
            raise RegistrationError(
                f"{ONE}; client {registration.client_id} has another "
                f"({registration.num_parameters:,} parameters) than client {other.client_id} "
                f"({other.num_parameters:,}). Use method = 'mh-pfedhn' for several."
            )

    def open_round(self, server_round: int, clients: Sequence[Client], exchange: Exchange) -> None:
        """Build the hypernetwork for the clients of the first round; embed those who are new."""
        if self._net is None:
            self._build(clients[0].num_parameters, 1 + len(clients) // 4)
        for client in clients:
            if client.client_id not in self._embeddings:
                seed, client_id = self.config.run.seed, client.client_id
                generator = torch_generator(seed, "pfedhn-embedding", client_id=client_id)
                drawn = torch.randn(self._embed_dim, generator=generator)
                self._embeddings[client_id] = nn.Parameter(drawn)

    def _build(self, num_parameters: int, embed_dim: int) -> None:
        widths = [embed_dim, *[HIDDEN] * LAYERS, num_parameters]
        generator = torch_generator(self.config.run.seed, "pfedhn")
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layer = nn.Linear(wide, narrow, device="meta").to_empty(device="cpu")
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -(wide**-0.5), wide**-0.5, generator=generator)
            layers += [layer, nn.ReLU()]
        # no ReLU behind the last of the four layers, as in the authors' own program, nor at the end
        self._net = nn.Sequential(*layers[:-3], layers[-2])
        self._embed_dim = embed_dim

    def download(self, client: Client) -> Arrays:
        """Return the client's generated weights."""
        with torch.no_grad():
            theta: Float32 = self._generate([client.client_id])[0].numpy()
        return {THETA: theta}

    def _generate(self, client_ids: Sequence[str]) -> Tensor:
        """Return theta (M, K)."""
        assert self._net is not None
        theta_MK: Tensor = self._net(torch.stack([self._embeddings[c] for c in client_ids]))
        return theta_MK

    def read(self, client: Client, reply: Received) -> Float32:
        """Read the change of the model, before minus after."""
        delta = reply.vector(DELTA, client.num_parameters)
        require_norm(delta, DELTA, self.max_norm)
        return delta

    def learn(self, uploads: Sequence[Upload[Float32]], **_: object) -> None:
        """Take one step along the mean of J^T delta (one upload: as published)."""
        theta_MK = self._generate([upload.client.client_id for upload in uploads])
        delta_MK = torch.stack([torch.from_numpy(upload.content) for upload in uploads])
        taking_part = self._named({upload.client.client_id for upload in uploads})
        gradients = torch.autograd.grad(
            theta_MK, list(taking_part.values()), delta_MK / len(uploads)
        )
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
        scale = min(1.0, CLIP_NORM / (norm + 1e-6))
        rate = self.config.baseline.baseline_server_lr
        with torch.no_grad():
            for (name, x), gradient in zip(taking_part.items(), gradients, strict=True):
                momentum = self._momenta.setdefault(name, torch.zeros_like(x))
                momentum.mul_(MOMENTUM).add_(gradient, alpha=scale).add_(x, alpha=WEIGHT_DECAY)
                x.sub_(momentum, alpha=rate)

    def _named(self, client_ids: Collection[str]) -> dict[str, nn.Parameter]:
        assert self._net is not None
        net = {f"net.{name}": p for name, p in self._net.named_parameters()}
        return net | {f"embedding.{c}": self._embeddings[c] for c in sorted(client_ids)}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the hypernetwork, the embeddings and SGD's momenta."""
        if self._net is None:
            return {}, {}
        tensors = {name: p.detach() for name, p in self._named(self._embeddings).items()}
        tensors |= {f"momentum.{name}": x for name, x in self._momenta.items()}
        facts = {
            "embed-dim": self._embed_dim,
            "num-parameters": self._net[-1].out_features,
            "clients": list(self._embeddings),
            "momenta": list(self._momenta),
        }
        return tensors, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load them."""
        if not facts:
            return
        self._build(facts["num-parameters"], facts["embed-dim"])
        for client_id in facts["clients"]:
            self._embeddings[client_id] = nn.Parameter(torch.empty(self._embed_dim))
        named = self._named(self._embeddings)
        for name, parameter in named.items():
            shape = tuple(parameter.shape)
            parameter.data.copy_(required_tensor(tensors, name, shape))
        for name in facts["momenta"]:
            shape = tuple(named[name].shape)
            self._momenta[name] = required_tensor(tensors, f"momentum.{name}", shape).clone()
