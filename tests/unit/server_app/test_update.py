"""The server step against the independent reference, and what it must never do."""

import math

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, UpdateSection
from common.errors import CheckpointError, RegistrationError
from server_app.aggregation import make_rule
from server_app.aggregation.base import Rule, schedule_factor
from server_app.hypernet.groups import Update
from server_app.hypernet.network import Hypernetwork
from tests.reference.algorithm import Hyper, ReferenceHypernet
from tests.support.close import assert_all_equal

pytestmark = pytest.mark.numeric

TOY = HypernetSection(chunk_size=10, embed_dim=4, hidden_dim=8, embedding_std=0.5)
UPDATE = UpdateSection(server_rule="adam", server_lr=1e-3, embedding_lr=5e-3, lr_decay_from=1.0)
HYPER = Hyper(server_lr=1e-3, embedding_lr=5e-3)
ATOL = 5e-5
"""Adam divides by the size of a gradient, so small gradients pass on their rounding in full."""
MIXED = {"c": 80, "a": 14, "d": 36, "b": 80}
SIZES = {"homogeneous": dict.fromkeys("cab", 36), "heterogeneous": MIXED}
GLOBAL = "global"


def system(sizes: dict[str, int]) -> Rule:
    hypernet = Hypernetwork(TOY, seed=5)
    hypernet.add_client(GLOBAL, 30)
    for client_id, size in sizes.items():
        hypernet.add_client(client_id, size)
    return make_rule(hypernet, UPDATE, total_rounds=10)


def parameters(rule: Rule) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in rule.hypernet.named_parameters().items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=ATOL)


@pytest.mark.parametrize("buffer_size", [1, 2, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_steps_agree_with_the_reference(sizes: dict[str, int], buffer_size: int) -> None:
    rule, generator = system(sizes), torch.Generator().manual_seed(1)
    reference = ReferenceHypernet(*rule.hypernet.state_dict(), hyper=HYPER)
    order = [*sizes, *sorted(sizes), *sizes]
    for first in range(0, len(order), buffer_size):
        cohort = dict.fromkeys(order[first : first + buffer_size])
        deltas = {c: torch.randn(sizes[c], generator=generator) for c in cohort}
        weights = {c: 1.0 + place for place, c in enumerate(cohort)}
        for client_id, theta in rule.hypernet.generate(list(cohort)).items():
            torch.testing.assert_close(theta, reference.theta(client_id), rtol=0, atol=ATOL)
        expected = reference.step(deltas, weights)
        done = rule.step([Update(c, deltas[c], weights[c]) for c in cohort], progress=0.0)
        assert done.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert_close(parameters(rule), expected.phi)


def test_the_global_step_follows_the_mean_by_weight() -> None:
    rule, generator = system(MIXED), torch.Generator().manual_seed(1)
    reference = ReferenceHypernet(*rule.hypernet.state_dict(), hyper=HYPER)
    deltas = {c: torch.randn(30, generator=generator) for c in "cad"}
    weights = {"c": 12.0, "a": 18.0, "d": 30.0}
    for _ in range(2):
        mean = sum(weights[c] / 60 * deltas[c] for c in deltas)
        expected = reference.step({GLOBAL: mean}, {GLOBAL: 1.0})
        replies = [Update(c, delta, weights[c]) for c, delta in deltas.items()]
        done = rule.step_global(GLOBAL, replies, progress=0.0)
        assert done.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert_close(parameters(rule), expected.phi)


def test_the_norm_is_clipped_like_the_reference() -> None:
    rule, delta = system(MIXED), torch.full((80,), 5000.0)
    reference = ReferenceHypernet(*rule.hypernet.state_dict(), hyper=HYPER)
    expected = reference.step({"c": delta}, {"c": 1.0})
    done = rule.step([Update("c", delta)], progress=0.0)
    assert done.clip_scale == pytest.approx(50 / expected.grad_norm, rel=1e-4)
    assert_close(parameters(rule), expected.phi)


def test_neither_order_nor_scale_of_weights_matters() -> None:
    deltas = {"c": torch.randn(80), "a": torch.randn(14), "d": torch.randn(36)}
    first, second = system(MIXED), system(MIXED)
    first.step([Update(c, d, 1.0 + len(d)) for c, d in deltas.items()], progress=0.0)
    second.step([Update(c, d, (1.0 + len(d)) / 4) for c, d in reversed(deltas.items())], progress=0)
    assert_all_equal(parameters(first), parameters(second))


def test_absent_parameters_do_not_move_and_keep_their_counters() -> None:
    update = system(MIXED)
    hypernet = update.hypernet
    for client_id in ("c", "a", "c"):
        delta = torch.ones(hypernet.num_parameters(client_id))
        update.step([Update(client_id, delta)], progress=0.0)
    still = parameters(update)
    before = {n: t.clone() for n, t in update.state_dict()[0].items()}
    update.step([Update("a", torch.ones(14))], progress=0.0)
    after, _ = update.state_dict()
    for name in ("heads.8.weight", "heads.8.bias", "embeddings.c", "embeddings.b"):
        assert torch.equal(hypernet.named_parameters()[name], still[name]), name
    assert "adam.step.embeddings.b" not in after
    for part in ("exp_avg", "exp_avg_sq", "step"):
        for name in ("heads.8.weight", "embeddings.c"):
            assert torch.equal(after[f"adam.{part}.{name}"], before[f"adam.{part}.{name}"])
    steps = {n: after[f"adam.step.{n}"].item() for n in ("trunk.0.weight", "embeddings.a")}
    assert steps == {"trunk.0.weight": 4.0, "embeddings.a": 2.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    update = system(MIXED)
    update.step([Update("c", torch.ones(80))], progress=0.0)
    before = parameters(update)
    moments = {n: t.clone() for n, t in update.state_dict()[0].items()}
    poisoned = torch.ones(80)
    poisoned[17] = bad
    updates = [Update("c", poisoned), Update("a", torch.ones(14))]
    done = update.step(updates, progress=0.0)
    assert not done.applied
    assert_all_equal(parameters(update), before)
    assert_all_equal(update.state_dict()[0], moments)
    assert update.step([Update("c", torch.ones(80))], progress=0.0).applied


def test_clients_added_and_removed_between_steps() -> None:
    update = system({"a": 14})
    update.step([Update("a", torch.ones(14))], progress=0.0)
    update.hypernet.add_client("late", 200)
    updates = [Update("late", torch.ones(200)), Update("a", torch.ones(14))]
    update.step(updates, progress=0.0)
    tensors, _ = update.state_dict()
    assert tensors["adam.step.heads.20.weight"].item() == 1.0
    assert tensors["adam.step.embeddings.a"].item() == 2.0
    update.hypernet.remove_client("a")
    update.hypernet.add_client("a", 14)
    update.step([Update("a", torch.ones(14))], progress=0.0)
    assert update.state_dict()[0]["adam.step.embeddings.a"].item() == 1.0


def test_rates_decay_by_a_cosine_to_their_last_fraction() -> None:
    def factors(section: UpdateSection) -> list[float]:
        return [schedule_factor(section, done, 24) for done in (0, 12, 18, 24, 30)]

    assert factors(UpdateSection(lr_decay_from=1.0)) == [1.0] * 5
    cosine = UpdateSection(lr_decay_from=0.0)
    assert factors(cosine)[::2] == pytest.approx([1.0, 0.1891, 0.05], abs=1e-4)
    assert factors(cosine)[1:4:2] == pytest.approx([0.525, 0.05])
    late = cosine.model_copy(update={"lr_decay_from": 0.5})
    assert factors(late) == pytest.approx([1.0, 1.0, 0.525, 0.05, 0.05])


def test_diagnostics_of_one_step() -> None:
    update = system({"a": 14, "b": 14})
    updates = [
        Update("a", torch.full((14,), 2.0), staleness=3),
        Update("b", torch.full((14,), 2.0), staleness=0),
    ]
    done = update.step(updates, progress=0.0)
    assert done.rms_delta == pytest.approx(2.0)
    assert done.coherence == pytest.approx(1.0)
    assert (done.mean_staleness, done.num_updates, done.applied) == (1.5, 2, True)
    assert (done.learning_rate, done.embedding_learning_rate) == (1e-3, 5e-3)


def test_errors_name_the_client() -> None:
    update = system({"a": 14})
    with pytest.raises(RegistrationError, match="no embedding for client 'z'"):
        update.step([Update("z", torch.ones(14))], progress=0.0)
    with pytest.raises(ValueError, match=r"delta of client 'a' has shape \(15,\)"):
        update.step([Update("a", torch.ones(15))], progress=0.0)
    with pytest.raises(ValueError, match=r"global delta of client 'a' has shape \(14,\)"):
        update.step_global(GLOBAL, [Update("a", torch.ones(14))], progress=0.0)
    with pytest.raises(ValueError, match=r"positive weight; got 0"):
        update.step([], progress=0.0)
    with pytest.raises(ValueError, match=r"client 'a' has weight -1\.0"):
        update.step([Update("a", torch.ones(14), -1.0)], progress=0.0)
    with pytest.raises(CheckpointError, match=r"Adam moments of 'embeddings\.gone'"):
        update.load_state_dict({}, {"adam": ["embeddings.gone"]})
