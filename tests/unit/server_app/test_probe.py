"""How far a step moved theta, against how far its deltas reach: in the same entries."""

import math

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, UpdateSection
from server_app.aggregation import make_network, make_rule
from server_app.aggregation.base import Rule, StepDiagnostics
from server_app.hypernet.groups import Update

pytestmark = pytest.mark.numeric

SHAPE = HypernetSection(chunk_size=10, embed_dim=32, hidden_dim=64, embedding_std=2.0)
FOLLOW = UpdateSection(lr_decay_from=1.0, server_rule="kernel", personal_gain=1.0)
"""A client that shares with nobody goes exactly as far as its deltas reach."""
SIZES = {
    "one": {"a": 250},
    "ragged": {"a": 247, "b": 241, "c": 250},
    "two sizes": {"a": 247, "b": 18, "c": 250, "d": 13, "e": 20},
    "below a chunk": {"a": 3, "b": 1, "c": 247, "d": 7},
    "many": {f"client {i:02}": (250, 247, 33)[i % 3] for i in range(30)},
}


def system(sizes: dict[str, int], section: UpdateSection, shape: HypernetSection = SHAPE) -> Rule:
    hypernet = make_network(section.server_rule, shape, seed=3)
    for client_id, size in sizes.items():
        hypernet.add_client(client_id, size)
    return make_rule(hypernet, section, total_rounds=10)


def deltas(sizes: dict[str, int]) -> dict[str, Tensor]:
    """Large in the last 30 entries, as of a classifier, and of a size of their own each."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for number, (client_id, size) in enumerate(sizes.items(), 1):
        found[client_id] = torch.randn(size, generator=generator) * number
        found[client_id][-30:] *= 10
    return found


def go(update: Rule, change: dict[str, Tensor], progress: float = 0.0) -> StepDiagnostics:
    return update.step([Update(c, d) for c, d in change.items()], progress=progress)


def rms(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().square().mean().sqrt())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_rate_is_one_where_theta_goes_as_far_as_the_deltas(sizes: dict[str, int]) -> None:
    update = system(sizes, FOLLOW, SHAPE.model_copy(update={"head_sharing": "own"}))
    for _ in range(2):
        before = update.hypernet.generate(list(sizes))
        change = deltas(sizes)
        done = go(update, change)
        after = update.hypernet.generate(list(sizes))
        for client_id, delta in change.items():  # or the test says nothing
            torch.testing.assert_close(
                before[client_id] - after[client_id], delta, rtol=0, atol=1e-2
            )
        assert done.effective_rate == pytest.approx(1.0, rel=1e-4)
        assert done.rms_delta == pytest.approx(rms([*change.values()]), rel=1e-5)
        assert done.rms_theta_change == pytest.approx(done.rms_delta, rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        {"head_sharing": "tolerance", "sharing_tolerance": 0.5},
        {},
    ],
)
def test_a_small_model_is_looked_at_whole(layout: dict[str, object]) -> None:
    sizes = {"a": 27, "b": 38, "c": 4, "d": 38, "e": 51, "f": 60}
    section = UpdateSection(server_rule="adam", server_lr=1e-2, embedding_lr=1e-2)
    update = system(sizes, section, SHAPE.model_copy(update=layout))
    before, change = update.hypernet.generate(list(sizes)), deltas(sizes)
    del change["d"]
    done = go(update, change)
    after = update.hypernet.generate(list(sizes))
    went = rms([after[c] - before[c] for c in change])
    assert 0 < done.rms_theta_change == pytest.approx(went, rel=1e-4)
    assert done.effective_rate == pytest.approx(went / rms([*change.values()]), rel=1e-4)


def test_a_group_weighs_by_its_entries_and_not_by_what_is_looked_at() -> None:
    sizes = {f"large {i:02}": 250 for i in range(20)} | {"small": 20}
    update = system(sizes, FOLLOW)
    update.freeze(["25"])
    done = go(update, {c: torch.ones(size) for c, size in sizes.items()})
    assert done.effective_rate == pytest.approx(math.sqrt(20 / 5020), rel=1e-4)


def test_each_delta_of_a_client_counts() -> None:
    update, delta = system({"a": 250}, FOLLOW), deltas({"a": 250})["a"]
    twice = [Update("a", delta), Update("a", delta, staleness=1)]
    assert update.step(twice, progress=0.0).effective_rate == pytest.approx(1.0, rel=1e-4)
    apart = [Update("a", delta), Update("a", 3 * delta)]  # theta goes by 2 delta
    rate = update.step(apart, progress=0.0).effective_rate
    assert rate == pytest.approx(2 / math.sqrt((1 + 9) / 2), rel=1e-4)


def test_the_global_model_is_held_against_its_mean_delta() -> None:
    update, change = system({"global": 247, "a": 33}, FOLLOW), deltas({"x": 247, "y": 247})
    replies = [Update(c, delta, weight=2.0) for c, delta in change.items()]
    done = update.step_global("global", replies, progress=0.0)
    assert done.effective_rate == pytest.approx(1.0, rel=1e-4)
    mean = (change["x"] + change["y"]) / 2
    assert done.rms_theta_change == pytest.approx(rms([mean]), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_without_a_delta_to_compare_with_the_rate_is_zero(value: float) -> None:
    done = go(system({"a": 25}, FOLLOW), {"a": torch.full((25,), value)})
    assert done.effective_rate == 0.0
    assert done.rms_theta_change == pytest.approx(0.0, abs=1e-6)


def test_the_factor_of_the_gains_is_told() -> None:
    update = system({"a": 25}, FOLLOW.model_copy(update={"lr_decay_from": 0.0}))
    found = [go(update, {"a": torch.ones(25)}, progress) for progress in (10.0, 5.0, 0.0)]
    assert [done.gain_factor for done in found] == pytest.approx([0.05, 0.525, 1.0])
    assert [done.effective_rate for done in found] == pytest.approx([0.05, 0.525, 1.0])
    assert [done.learning_rate for done in found] == [0.0] * 3


def test_coherence_is_one_when_deltas_agree_and_zero_when_they_cancel() -> None:
    one = torch.ones(27)
    for sign, coherence in ((1.0, 1.0), (-1.0, 0.0)):
        done = go(system({"a": 27, "b": 27}, FOLLOW), {"a": one, "b": sign * one})
        assert done.coherence == pytest.approx(coherence, abs=1e-6)
