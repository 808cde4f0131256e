"""The server step against the independent reference, and what it must never do."""

import math

import pytest
import torch
from torch import Tensor, nn

from common.config import HypernetSection, UpdateSection
from common.errors import CheckpointError, RegistrationError
from server_app.aggregation import make_rule
from server_app.aggregation.base import Rule, Update, schedule_factor
from server_app.hypernet.network import Hypernetwork
from tests.reference.algorithm import (
    Client,
    Hyper,
    ReferenceHypernet,
    Trace,
    load_theta,
    local_training,
    one_round_gd,
    one_round_hn,
    read_theta,
    train_client,
)
from tests.support.pulls import pull

pytestmark = pytest.mark.numeric

TOY = HypernetSection(
    chunk_size=10, embed_dim=4, hidden_dim=8, embedding_std=0.5, head_init="torch"
)
UPDATE = UpdateSection(server_rule="adam", server_lr=1e-3, embedding_lr=5e-3, lr_decay_from=1.0)
ATOL = 5e-5
"""Adam divides by the size of a gradient, so small gradients pass on their rounding in full."""
WIDTHS = {"homogeneous": dict.fromkeys("cab", 3), "heterogeneous": {"c": 7, "a": 1, "d": 3, "b": 7}}
GLOBAL = "global"


def mlp(width: int) -> nn.Module:
    """5 -> width -> 3 with BatchNorm; 11 width + 3 parameters."""
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def global_model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))


def batches(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, 5, generator=generator),
            torch.randint(3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def cohort(widths: dict[str, int]) -> dict[str, Client]:
    return {
        c: Client(lambda w=w: mlp(w), batches(i, 2 + i), global_batches=batches(50 + i, 2 + i))
        for i, (c, w) in enumerate(widths.items())
    }


def system(widths: dict[str, int], section: UpdateSection = UPDATE) -> Rule:
    hypernet = Hypernetwork(TOY, seed=5)
    hypernet.add_client(GLOBAL, 30)
    for client_id, width in widths.items():
        hypernet.add_client(client_id, 11 * width + 3)
    return make_rule(hypernet, section, total_rounds=10)


def hyper(**changes: float) -> Hyper:
    return Hyper(
        server_lr=1e-3, embedding_lr=5e-3, learning_rate=0.1, alpha=0.3, temperature=3.0, **changes
    )


def system_personal(
    update: Rule,
    clients: dict[str, Client],
    order: list[str],
    *,
    settings: Hyper,
    teacher: nn.Module | None = None,
) -> Trace:
    """Run the personal phase with the system's server and the reference's local training."""
    trace, hypernet = Trace(), update.hypernet
    for first in range(0, len(order), settings.buffer_size):
        ids = order[first : first + settings.buffer_size]
        thetas = hypernet.generate(ids)
        trace.theta |= thetas
        for c, theta in thetas.items():
            trained = train_client(clients[c], theta, hyper=settings, teacher=teacher)
            trace.delta[c] = theta - trained
        done = update.step([Update(c, trace.delta[c]) for c in ids], progress=0.0)
        trace.grad_norms.append(done.grad_norm)
        trace.phi.append({n: p.detach().clone() for n, p in hypernet.named_parameters().items()})
    return trace


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=ATOL)


def assert_same_round(got: Trace, expected: Trace) -> None:
    assert_close(got.theta, expected.theta)
    assert_close(got.delta, expected.delta)
    assert got.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert len(got.phi) == len(expected.phi)
    for mine, theirs in zip(got.phi, expected.phi, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("buffer_size", [1, 2, 4])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_rounds_agree_with_the_reference(widths: dict[str, int], buffer_size: int) -> None:
    update, settings = system(widths), hyper(buffer_size=buffer_size)
    reference = ReferenceHypernet(*update.hypernet.state_dict(), hyper=settings)
    mine, theirs = cohort(widths), cohort(widths)
    for order in (list(widths), sorted(widths), list(widths)):
        expected = one_round_hn(reference, theirs, order)
        assert_same_round(system_personal(update, mine, order, settings=settings), expected)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_gd_rounds_agree_with_the_reference(widths: dict[str, int]) -> None:
    update, settings = system(widths), hyper()
    reference = ReferenceHypernet(*update.hypernet.state_dict(), hyper=settings)
    mine, theirs = cohort(widths), cohort(widths)
    for order in (list(widths), sorted(widths)):
        expected = one_round_gd(
            reference, theirs, order, global_id=GLOBAL, make_global=global_model
        )
        sent = update.hypernet.generate([GLOBAL])[GLOBAL]
        replies = []
        for c in order:
            model = load_theta(global_model(), sent)
            local_training(model, mine[c].global_batches, hyper=settings, clip=None)
            weight = float(mine[c].num_examples)
            replies.append(Update(c, sent - read_theta(model), weight))
        done = update.step_global(GLOBAL, replies, progress=0.0)
        first = {n: p.detach().clone() for n, p in update.hypernet.named_parameters().items()}
        teacher = load_theta(global_model(), sent).eval()
        got = system_personal(update, mine, order, settings=settings, teacher=teacher)
        got.phi.insert(0, first)
        got.grad_norms.insert(0, done.grad_norm)
        torch.testing.assert_close(sent, expected.global_theta, rtol=0, atol=1e-5)
        assert_close({r.client_id: r.delta for r in replies}, expected.global_delta)
        assert_same_round(got, expected)


def test_the_norm_is_clipped_like_the_reference() -> None:
    widths = WIDTHS["heterogeneous"]
    update, settings, delta = system(widths), hyper(), torch.full((80,), 5000.0)
    reference = ReferenceHypernet(*update.hypernet.state_dict(), hyper=settings)
    expected = reference.step({"c": delta}, {"c": 1.0})
    done = update.step([Update("c", delta)], progress=0.0)
    assert done.clip_scale == pytest.approx(50 / expected.grad_norms[0], rel=1e-4)
    named = {n: p.detach() for n, p in update.hypernet.named_parameters().items()}
    assert_close(named, expected.phi[0])


def test_weights_are_relative() -> None:
    a, b = torch.randn(80), torch.randn(80)
    first, second = system({"c": 7, "b": 7}), system({"c": 7, "b": 7})
    first.step([Update("c", a, 1.0), Update("b", b, 3.0)], progress=0.0)
    second.step([Update("b", b, 0.75), Update("c", a, 0.25)], progress=0.0)
    for name, parameter in first.hypernet.named_parameters().items():
        assert torch.equal(parameter, second.hypernet.named_parameters()[name]), name


def test_absent_parameters_do_not_move_and_keep_their_counters() -> None:
    update = system(WIDTHS["heterogeneous"])
    hypernet = update.hypernet
    for client_id in ("c", "a", "c"):
        delta = torch.ones(hypernet.num_parameters(client_id))
        update.step([Update(client_id, delta)], progress=0.0)
    still = {n: p.detach().clone() for n, p in hypernet.named_parameters().items()}
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


def test_fused_adam_equals_the_plain_formula() -> None:
    update = system({"a": 1})
    embedding = update.hypernet.embeddings["a"]
    value, m, v = embedding.detach().double().clone(), 0.0, 0.0
    for t in range(1, 4):
        pull(update.hypernet, ("a", torch.ones(14), 1.0))
        gradient = embedding.grad.double().clone()
        update.step([Update("a", torch.ones(14))], progress=0.0)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        value -= 5e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(embedding.detach().double(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    update = system(WIDTHS["heterogeneous"])
    update.step([Update("c", torch.ones(80))], progress=0.0)
    before = {n: p.detach().clone() for n, p in update.hypernet.named_parameters().items()}
    moments = {n: t.clone() for n, t in update.state_dict()[0].items()}
    poisoned = torch.ones(80)
    poisoned[17] = bad
    updates = [Update("c", poisoned), Update("a", torch.ones(14))]
    done = update.step(updates, progress=0.0)
    assert not done.applied
    for name, parameter in update.hypernet.named_parameters().items():
        assert torch.equal(parameter, before[name]), name
    for name, tensor in update.state_dict()[0].items():
        assert torch.equal(tensor, moments[name]), name
    assert update.step([Update("c", torch.ones(80))], progress=0.0).applied


def test_arrival_order_of_updates_does_not_matter() -> None:
    deltas = {"c": torch.randn(80), "a": torch.randn(14), "d": torch.randn(36)}
    first, second = system(WIDTHS["heterogeneous"]), system(WIDTHS["heterogeneous"])
    first.step([Update(c, d) for c, d in deltas.items()], progress=0.0)
    second.step([Update(c, d) for c, d in reversed(deltas.items())], progress=0.0)
    for name, parameter in first.hypernet.named_parameters().items():
        assert torch.equal(parameter, second.hypernet.named_parameters()[name]), name


def test_clients_added_and_removed_between_steps() -> None:
    update = system({"a": 1})
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
    update = system({"a": 1, "b": 1})
    updates = [
        Update("a", torch.full((14,), 2.0), staleness=3),
        Update("b", torch.full((14,), 2.0), staleness=0),
    ]
    done = update.step(updates, progress=0.0)
    assert done.rms_delta == pytest.approx(2.0)
    assert done.coherence == pytest.approx(1.0)
    assert (done.mean_staleness, done.num_updates, done.applied) == (1.5, 2, True)
    assert (done.learning_rate, done.embedding_learning_rate) == (1e-3, 5e-3)


def test_resumed_steps_equal_uninterrupted_ones_bitwise() -> None:
    def steps(update: Rule, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for ids in (["c"], ["d", "a"], ["b", "c", "a"]):
                sizes = [update.hypernet.num_parameters(c) for c in ids]
                deltas = [torch.randn(size, generator=generator) for size in sizes]
                pairs = zip(ids, deltas, strict=True)
                update.step([Update(c, d) for c, d in pairs], progress=0.0)

    whole = system(WIDTHS["heterogeneous"])
    steps(whole, 2, seed=1)
    tensors, meta = whole.hypernet.state_dict()
    adam_tensors, adam_meta = whole.state_dict()
    saved = {name: t.clone() for name, t in (tensors | adam_tensors).items()}
    steps(whole, 2, seed=2)

    resumed = make_rule(Hypernetwork(TOY, seed=0), UPDATE, total_rounds=10)
    resumed.hypernet.load_state_dict(saved, meta)
    resumed.load_state_dict(saved, adam_meta)
    steps(resumed, 2, seed=2)
    for name, parameter in whole.hypernet.named_parameters().items():
        assert torch.equal(parameter, resumed.hypernet.named_parameters()[name]), name
    mine, theirs = whole.state_dict()[0], resumed.state_dict()[0]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_errors_name_the_client() -> None:
    update = system({"a": 1})
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
