"""The trunk: the layers of the hypernetwork that every client shares."""

from __future__ import annotations

import math

import torch
from torch import nn

from common.config import HypernetSection

LAYERS = 3


def draw_trunk(section: HypernetSection, generator: torch.Generator) -> nn.Sequential:
    """Draw Linear(E, H), ReLU and then Linear(H, H), ReLU up to LAYERS Linears.

    torch's default Linear initialisation, from the generator (CPU) instead of the global state.
    """
    layers: list[nn.Module] = []
    width = section.embed_dim
    for _ in range(LAYERS):
        linear = nn.Linear(width, section.hidden_dim, device="meta").to_empty(device="cpu")
        bound = 1 / math.sqrt(width)
        for tensor in (linear.weight, linear.bias):
            tensor.data.uniform_(-bound, bound, generator=generator)
        layers += [linear, nn.ReLU()]
        width = section.hidden_dim
    return nn.Sequential(*layers)
