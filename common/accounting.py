"""How much privacy is spent: epsilon of noisy releases, added up by Opacus' RDP accountant.

A release is a sum of vectors, each clipped to norm C, with Gaussian noise of standard deviation
z C on every entry (z: the noise multiplier), over a sample in which everybody is by chance, with
probability q (Poisson; q = 1: everybody always). The bound holds against one that is added or
removed (Mironov, Talwar, Zhang 2019; Abadi et al. 2016).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from common.config.client import LEAST_NOISE
from common.errors import ConfigError

DELTA = 1e-5
"""delta of a user-level guarantee, and the largest of an example-level one."""
ORDERS = [
    *(1 + x / 100 for x in range(1, 10)),
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *range(64, 257, 8),
    *(2**k for k in range(9, 13)),
]
"""Renyi orders that are tried; the best one counts. Each takes as long as it is large."""
MOST_NOISE = 1e4


class Spent(NamedTuple):
    """So many releases with a noise multiplier z, 0: in the clear, and a sampling rate q."""

    noise: float
    rate: float
    steps: int


def delta_for(num_examples: int) -> float:
    """Return delta of n examples: 1e-5, or n^-1.1 where that is smaller.

    >>> delta_for(450)
    1e-05
    """
    return min(DELTA, math.pow(num_examples, -1.1))


def epsilon(spent: Iterable[Spent], delta: float) -> float:
    """Return the epsilon of all these releases together: 0 for none, inf where one had no noise.

    Raises ConfigError where Opacus is not installed.
    """
    parts = [part for part in spent if part.steps]
    if not parts:
        return 0.0
    if not all(part.noise for part in parts):
        return math.inf
    rdp = require_accountant()
    losses: Any = sum(p.steps * _loss_of_one(p.noise, p.rate) for p in parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the best order is the first": the bound still holds
        found, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=losses, delta=delta)
    return max(0.0, float(found))


@lru_cache(maxsize=4096)
def _loss_of_one(noise: float, rate: float) -> Any:
    """Return the Renyi divergence of one release at every order; those of several add up."""
    return require_accountant().compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS)


def noise_for(wanted: float, *, rate: float, steps: int, delta: float) -> float:
    """Return the least noise multiplier, to 1 in 1000, whose epsilon is at most `wanted`.

    Raises ConfigError where no multiplier from 0.2 to 10,000 has it.
    """
    low, high = LEAST_NOISE, MOST_NOISE
    if not epsilon([Spent(high, rate, steps)], delta) <= wanted:
        raise ConfigError(
            f"epsilon {wanted:g} over {steps} steps needs a noise multiplier above {MOST_NOISE:g}. "
            "Ask for a larger epsilon, or for fewer steps."
        )
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        enough = epsilon([Spent(middle, rate, steps)], delta) <= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high


@cache
def require_accountant() -> Any:
    """Import Opacus' accountant (two seconds); raise ConfigError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.accountants.analysis import rdp
    except ImportError as error:
        raise ConfigError(
            "differential privacy is accounted for by Opacus, which is not installed here. "
            'Install it: pip install "mh-pfedhn[privacy]" or pip install opacus.'
        ) from error
    return rdp
