"""One round of MH-pFedHN and of MH-pFedHNGD, slowly and clearly (method.md; arXiv 2507.22330).

Independent of the system: nothing is imported from it. Plain nn.Linear heads one by one, autograd
through everything, torch.optim.Adam over everything, one client after the other, torch SGD over
the parameters of the client's model. Only for toy sizes.

A start comes from the system by names and shapes alone (`Hypernetwork.state_dict`):

    tensors  trunk.<layer>.weight, trunk.<layer>.bias           as nn.Linear stores them
             heads.<num_chunks>.weight (C, H, S), .bias (C, S)  the transpose of nn.Linear's
             embeddings.<client_id> (C, E)
    meta     {"clients": [[client_id, num_parameters], ...], ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Hyper:
    """Every number of the method, with the published defaults."""

    server_lr: float = 2e-4
    embedding_lr: float = 2e-4
    server_clip: float = 50.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    buffer_size: int = 1
    learning_rate: float = 5e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    client_clip: float = 50.0
    alpha: float = 0.2
    temperature: float = 15.0


@dataclass
class Client:
    """What a client holds: how to build its model, its batches in order, its running statistics.

    `batches` are those of one local training of the personal model, `global_batches` those of the
    copy of the global model. `buffers` (BatchNorm) are kept here from round to round.
    """

    make_model: Callable[[], nn.Module]
    batches: Sequence[Batch]
    global_batches: Sequence[Batch] = ()
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """n_i, from the batches of one epoch."""
        return sum(len(labels) for _, labels in self.global_batches or self.batches)


@dataclass(frozen=True)
class Step:
    """A server step: its gradients, their norm before it is clipped, and phi after it."""

    gradients: dict[str, Tensor]
    grad_norm: float
    phi: dict[str, Tensor]


@dataclass
class Trace:
    """What crossed the wire in a round, by client."""

    theta: dict[str, Tensor] = field(default_factory=dict)
    delta: dict[str, Tensor] = field(default_factory=dict)
    global_theta: Tensor | None = None
    global_delta: dict[str, Tensor] = field(default_factory=dict)


class ReferenceHypernet:
    """Embeddings, trunk and lists of nn.Linear heads, with its Adam."""

    def __init__(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, hyper: Hyper
    ) -> None:
        self.hyper = hyper
        self.sizes: dict[str, int] = dict(meta["clients"])
        self.trunk = _trunk(tensors)
        self.heads = {
            int(name.split(".")[1]): _heads(tensors[name], tensors[name[: -len("weight")] + "bias"])
            for name in tensors
            if name.startswith("heads.") and name.endswith(".weight")
        }
        self.embeddings = {
            client_id: nn.Parameter(tensors[f"embeddings.{client_id}"].clone())
            for client_id in self.sizes
        }
        shared = [*self.trunk.parameters()]
        for heads in self.heads.values():
            shared += heads.parameters()
        groups = [
            {"params": shared, "lr": hyper.server_lr},
            {"params": list(self.embeddings.values()), "lr": hyper.embedding_lr},
        ]
        self.adam = torch.optim.Adam(groups, betas=hyper.betas, eps=hyper.eps)

    def theta(self, client_id: str) -> Tensor:
        """Compute h(v_i; phi) (P_i,) chunk by chunk, with its graph."""
        embedding = self.embeddings[client_id]
        heads = self.heads[len(embedding)]
        chunks = [head(self.trunk(row)) for head, row in zip(heads, embedding, strict=True)]
        return torch.cat(chunks)[: self.sizes[client_id]]

    def step(self, deltas: Mapping[str, Tensor], weights: Mapping[str, float]) -> Step:
        """Clip the mean of J_i^T delta_i and take one Adam step; parameters left out do not move.

        Trunk and embeddings get sum_i w_i J_i^T delta_i over the buffer, w summing to 1; the heads
        of a group the same sum with the w of the group's own clients summing to 1.
        """
        self.adam.zero_grad(set_to_none=True)
        total = sum(weights.values())
        group_total: dict[int, float] = {}
        for client_id in deltas:
            share = weights[client_id] / total
            (self.theta(client_id) @ deltas[client_id] * share).backward()
            group = len(self.embeddings[client_id])
            group_total[group] = group_total.get(group, 0.0) + share
        for group, share in group_total.items():
            for parameter in self.heads[group].parameters():
                parameter.grad = parameter.grad / share
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        gradients = self._named(lambda p: None if p.grad is None else p.grad.clone())
        touched = [p for p in parameters if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(touched, self.hyper.server_clip)
        self.adam.step()
        return Step(gradients, norm.item(), self.state())

    def state(self) -> dict[str, Tensor]:
        """Return copies of phi and the embeddings under the system's names and shapes."""
        return self._named(lambda p: p.detach().clone())

    def _named(self, read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        named = {f"trunk.{name}": read(p) for name, p in self.trunk.named_parameters()}
        for chunks, heads in self.heads.items():
            weights = [read(head.weight) for head in heads]
            biases = [read(head.bias) for head in heads]
            if weights[0] is not None:
                named[f"heads.{chunks}.weight"] = torch.stack([w.T for w in weights])
                named[f"heads.{chunks}.bias"] = torch.stack(biases)
        for client_id, embedding in self.embeddings.items():
            named[f"embeddings.{client_id}"] = read(embedding)
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def one_round_hn(
    hypernet: ReferenceHypernet,
    clients: Mapping[str, Client],
    order: Sequence[str],
    *,
    teacher: nn.Module | None = None,
) -> Trace:
    """Run one MH-pFedHN round: clients in `order`, `buffer_size` of them per server step.

    With buffer_size 1 each client's theta comes from the phi that its predecessor just moved: the
    published algorithm. With more, a cohort trains from one phi and its mean makes one step.
    """
    trace = Trace()
    size = hypernet.hyper.buffer_size
    for first in range(0, len(order), size):
        cohort = order[first : first + size]
        for client_id in cohort:
            trace.theta[client_id] = hypernet.theta(client_id).detach().clone()
        for client_id in cohort:
            theta = trace.theta[client_id]
            trained = train_client(clients[client_id], theta, hyper=hypernet.hyper, teacher=teacher)
            trace.delta[client_id] = theta - trained
        hypernet.step({c: trace.delta[c] for c in cohort}, dict.fromkeys(cohort, 1.0))
    return trace


def one_round_gd(
    hypernet: ReferenceHypernet,
    clients: Mapping[str, Client],
    order: Sequence[str],
    *,
    global_id: str,
    make_global: Callable[[], nn.Module],
) -> Trace:
    """Run one MH-pFedHNGD round, two phases one after the other (not fused).

    Phase 1: all clients train a copy of w_g, no clip; one server step on the mean of their deltas
    by examples. Phase 2: as `one_round_hn`, with w_g AS IT WAS SENT as the teacher.
    """
    sent = hypernet.theta(global_id).detach().clone()
    deltas = {}
    for client_id in order:
        model = load_theta(make_global(), sent)
        local_training(model, clients[client_id].global_batches, hyper=hypernet.hyper, clip=None)
        deltas[client_id] = sent - read_theta(model)
    total = sum(clients[client_id].num_examples for client_id in order)
    mean = sum(clients[c].num_examples / total * deltas[c] for c in order)
    hypernet.step({global_id: mean}, {global_id: 1.0})

    teacher = load_theta(make_global(), sent).eval()
    trace = one_round_hn(hypernet, clients, order, teacher=teacher)
    trace.global_theta, trace.global_delta = sent, deltas
    return trace


def train_client(
    client: Client, theta: Tensor, *, hyper: Hyper, teacher: nn.Module | None = None
) -> Tensor:
    """Train a client's model from theta with its own running statistics; return theta' (P_i,)."""
    model = load_theta(client.make_model(), theta)
    for name, buffer in model.named_buffers():
        if name in client.buffers:
            buffer.copy_(client.buffers[name])
    local_training(model, client.batches, hyper=hyper, clip=hyper.client_clip, teacher=teacher)
    client.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return read_theta(model)


def local_training(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    hyper: Hyper,
    clip: float | None,
    teacher: nn.Module | None = None,
) -> None:
    """Train by SGD over the batches as given; momentum starts at zero each time.

    Without a teacher the loss is cross-entropy. With one it is
    alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) cross-entropy, the
    divergence being the mean over the batch.
    """
    sgd = torch.optim.SGD(
        model.parameters(),
        lr=hyper.learning_rate,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
    )
    model.train()
    for images, labels in batches:
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                log_p = torch.log_softmax(teacher(images) / hyper.temperature, dim=1)
            log_q = torch.log_softmax(logits / hyper.temperature, dim=1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
            loss = hyper.alpha * hyper.temperature**2 * divergence + (1 - hyper.alpha) * loss
        sgd.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        sgd.step()


def load_theta(model: nn.Module, theta: Tensor) -> nn.Module:
    """Write theta into a model, tensor by tensor in `named_parameters` order."""
    offset = 0
    for _, parameter in model.named_parameters():
        piece = theta[offset : offset + parameter.numel()]
        parameter.data = piece.clone().reshape(parameter.shape)
        offset += parameter.numel()
    if offset != len(theta):
        raise ValueError(f"theta has {len(theta)} entries; the model takes {offset}.")
    return model


def read_theta(model: nn.Module) -> Tensor:
    """Return the model's parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for _, p in model.named_parameters()])


def _trunk(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    indices = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("trunk.")})
    layers: list[nn.Module] = []
    for index in indices:
        weight, bias = tensors[f"trunk.{index}.weight"], tensors[f"trunk.{index}.bias"]
        layers += [_linear(weight, bias), nn.ReLU()]
    return nn.Sequential(*layers)


def _heads(weight: Tensor, bias: Tensor) -> nn.ModuleList:
    return nn.ModuleList(_linear(w.T, b) for w, b in zip(weight, bias, strict=True))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight.clone()
    linear.bias.data = bias.clone()
    return linear
