"""The accountant against closed forms and a published figure; noise that a target needs."""

import math
import sys

import pytest

from common.accounting import Spent, delta_for, epsilon, noise_for, require_accountant
from common.errors import ConfigError


def exact_gaussian_delta(eps: float, mu: float) -> float:
    """delta of a Gaussian mechanism of sensitivity mu, noise 1 (Balle and Wang 2018, theorem 8)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 20), (20.0, 100)])
def test_without_sampling_it_is_the_gaussian_mechanism(noise: float, steps: int) -> None:
    found, mu = epsilon([Spent(noise, 1.0, steps)], 1e-5), math.sqrt(steps) / noise
    assert exact_gaussian_delta(found, mu) <= 1e-5, "no less than the exact one"
    assert exact_gaussian_delta(found / 1.2, mu) > 1e-5, "and no more than a fifth above it"


def test_a_published_figure() -> None:
    """Abadi et al. 2016, figure 2: q 0.01, noise 4, 10,000 steps: 1.26 at delta 1e-5."""
    assert epsilon([Spent(4.0, 0.01, 10_000)], 1e-5) == pytest.approx(1.26, abs=0.25)


def test_releases_add_up_whatever_their_noise() -> None:
    parts = [Spent(1.0, 0.1, 30), Spent(2.0, 0.3, 10)]
    assert epsilon([Spent(1.0, 0.1, 10)] * 3, 1e-5) == pytest.approx(epsilon(parts[:1], 1e-5))
    assert epsilon(parts, 1e-5) > max(epsilon([part], 1e-5) for part in parts)
    assert epsilon([], 1e-5) == epsilon([Spent(1.0, 0.1, 0)], 1e-5) == 0.0


def test_noise_for_a_target_is_just_enough() -> None:
    noise = noise_for(3.0, rate=0.25, steps=100, delta=1e-5)
    assert 2.95 < epsilon([Spent(noise, 0.25, 100)], 1e-5) <= 3.0
    with pytest.raises(ConfigError, match=r"epsilon 1e-09 over 100 steps needs .*above 10000"):
        noise_for(1e-9, rate=0.25, steps=100, delta=1e-5)


def test_without_noise_there_is_no_epsilon() -> None:
    assert epsilon([Spent(1.0, 0.1, 3), Spent(0.0, 1.0, 1)], 1e-5) == math.inf
    assert epsilon([Spent(1.0, 0.1, 3), Spent(0.0, 1.0, 0)], 1e-5) < math.inf


def test_delta_is_below_one_in_n() -> None:
    assert delta_for(50) == 1e-5
    assert delta_for(10**6) == pytest.approx(10**-6.6)


def test_a_missing_accountant_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_accountant.cache_clear()
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    with pytest.raises(ConfigError, match=r"pip install .*privacy"):
        epsilon([Spent(1.0, 0.1, 1)], 1e-5)
    require_accountant.cache_clear()
