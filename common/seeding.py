"""Randomness has an owner: one independent stream for each (seed, purpose, round, client).

No function here or elsewhere in the project touches the global random state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, server_round: int = 0, client_id: str = "") -> int:
    """Derive a 63-bit seed that is stable across processes, machines and Python versions."""
    key = f"{seed}|{purpose}|{server_round}|{client_id}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def torch_generator(
    seed: int,
    purpose: str,
    *,
    server_round: int = 0,
    client_id: str = "",
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """Make a torch generator for one purpose, on the device where it will be used."""
    generator = torch.Generator(device=device)
    generator.manual_seed(stream_seed(seed, purpose, server_round, client_id))
    return generator


def numpy_generator(
    seed: int, purpose: str, *, server_round: int = 0, client_id: str = ""
) -> np.random.Generator:
    """Make a numpy generator for one purpose."""
    return np.random.default_rng(stream_seed(seed, purpose, server_round, client_id))
