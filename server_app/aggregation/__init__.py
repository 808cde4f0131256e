"""Hypernetworks, and the rules that move them along the updates of their clients.

A new rule: a subclass of `Rule`, a line in `RULES`, its name in `server-rule`.
"""

from __future__ import annotations

from typing import Any

import torch

from common.config import HypernetSection, UpdateSection
from common.errors import ConfigError
from server_app.aggregation.adam import AdamRule
from server_app.aggregation.base import Rule
from server_app.aggregation.kernel import KernelRule
from server_app.hypernet.base import Network
from server_app.hypernet.kernel import KernelNetwork
from server_app.hypernet.network import Hypernetwork

RULES: dict[str, tuple[type[Any], type[Any]]] = {
    "adam": (Hypernetwork, AdamRule),
    "kernel": (KernelNetwork, KernelRule),
}
"""By name: the hypernetwork that the rule moves, and the rule."""


def make_network(
    rule: str, section: HypernetSection, *, seed: int, device: torch.device | str = "cpu"
) -> Network:
    """Make the hypernetwork that a rule moves."""
    network: Network = RULES[rule][0](section, seed=seed, device=device)
    return network


def make_rule(hypernet: Network, section: UpdateSection, *, total_rounds: float) -> Rule:
    """Make the rule that `server-rule` names, for its hypernetwork."""
    rule: Rule = RULES[section.server_rule][1](hypernet, section, total_rounds=total_rounds)
    return rule


def server_device(wish: str) -> torch.device:
    """Return where the hypernetwork lives; raise ConfigError where that is no device here."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"server-device = {wish!r}, but torch sees no GPU here: use auto or cpu.")
    try:
        return torch.device(wish)
    except RuntimeError as error:
        raise ConfigError(
            f"server-device = {wish!r} is no torch device: auto, cpu, cuda."
        ) from error
