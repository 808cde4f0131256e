"""The default rule against its slow and clear reference, and what it promises."""

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, RunConfig, UpdateSection
from common.errors import ConfigError
from server_app.aggregation import make_rule
from server_app.aggregation.base import Rule, Update
from server_app.aggregation.least_squares import gains, ridge_rows
from server_app.hypernet.network import Hypernetwork
from tests.reference.least_squares import Gains, ReferenceServer
from tests.support.close import assert_all_equal

pytestmark = pytest.mark.numeric

TOY = HypernetSection(
    chunk_size=10, embed_dim=16, hidden_dim=32, embedding_std=2.0, head_init="shared"
)
GAIN, BETA, OWN = 0.8, 0.6, 0.3
AT_REST = UpdateSection(
    lr_decay_from=1.0,
    server_rule="least-squares",
    shared_gain=GAIN,
    shared_momentum=BETA,
    personal_gain=OWN,
    kernel_damping=0.05,
    server_lr=0.0,
    embedding_lr=0.0,
)
EXACT = AT_REST.model_copy(update={"kernel_damping": 1e-9})
"""Without damping theta of who is in the buffer goes exactly where it is asked to."""
LEARNING = AT_REST.model_copy(update={"server_lr": 1e-3, "embedding_lr": 1e-2})
SIZES = {"c": 27, "a": 21, "b": 27, "d": 30, "z": 8, "g": 30}
"""All but z share a head group of three chunks, the last one ragged; z has one of its own."""
GROUP = "cabdg"
SCHEDULES = {
    "sequential": ["c", "z", "b", "g", "a", "d"],
    "cohorts": ["cz", "bg", "ad"],
    "at once": ["cabdzg"],
    "mixed": ["b", "cabdzg", "bz", "cc", "dg"],
}


def make(section: UpdateSection = AT_REST, shape: HypernetSection = TOY, rounds: int = 10) -> Rule:
    hypernet = Hypernetwork(shape, seed=3)
    for client_id, size in SIZES.items():
        hypernet.add_client(client_id, size)
    return make_rule(hypernet, section, total_rounds=rounds)


def deltas(seed: int, client_ids: Sequence[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(SIZES[c], generator=generator) for c in client_ids}


def go(rule: Rule, change: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take a step; return how far every client's theta went."""
    before = rule.hypernet.generate(list(SIZES))
    rule.step([Update(c, d) for c, d in change.items()], progress=0.0)
    after = rule.hypernet.generate(list(SIZES))
    return {c: after[c] - before[c] for c in SIZES}


def padded(delta: Tensor) -> Tensor:
    return torch.cat([delta, torch.zeros(30 - len(delta))])


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected[: len(got)], rtol=0, atol=2e-5)  # float32 products


# --- against the reference -----------------------------------------------------------------------


def reference_of(rule: Rule, section: UpdateSection, rounds: int) -> ReferenceServer:
    fitted = {
        "momentum": section.shared_momentum if section.shared_momentum >= 0 else None,
        "personal": section.personal_gain if section.personal_gain >= 0 else None,
    }
    numbers = Gains(
        shared=section.shared_gain,
        damping=section.kernel_damping,
        rounds=rounds,
        server_lr=section.server_lr,
        embedding_lr=section.embedding_lr,
        **fitted,
    )
    return ReferenceServer(*rule.hypernet.state_dict(), numbers)


def assert_same(rule: Rule, reference: ReferenceServer) -> None:
    for client_id, theta in rule.hypernet.generate(rule.hypernet.clients()).items():
        expected = reference.theta(client_id).detach().float()
        torch.testing.assert_close(theta, expected, rtol=0, atol=1e-4)  # float32 against float64


FITTED = AT_REST.model_copy(update={"shared_momentum": -1.0, "personal_gain": -1.0})
SECTIONS = {"at rest": AT_REST, "gains that fit": FITTED, "learning": LEARNING}


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_agrees_with_the_reference(
    schedule: list[str], section: UpdateSection
) -> None:
    rule = make(section, rounds=12)
    reference = reference_of(rule, section, rounds=12)
    for seed, cohort in enumerate(2 * schedule):
        updates = [
            Update(c, torch.randn(SIZES[c], generator=_random(seed, i)), weight=1.0 + i)
            for i, c in enumerate(cohort)
        ]
        rule.step(updates, progress=0.0)
        reference.step([(u.client_id, u.delta, u.weight) for u in updates])
        assert_same(rule, reference)


def _random(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * seed + place)


@pytest.mark.parametrize("section", [AT_REST, LEARNING], ids=["at rest", "learning"])
def test_a_client_that_joins_late_and_one_that_leaves(section: UpdateSection) -> None:
    rule = make(section)
    reference = reference_of(rule, section, rounds=10)
    for seed, cohort in enumerate(["ca", "late z", "bdz", "late", "gone", "late c"]):
        if cohort == "gone":
            rule.hypernet.remove_client("b")
            reference.groups[3].clients.remove("b")
            del reference.sizes["b"], reference.embeddings["b"]
            continue
        ids = cohort.split() if "late" in cohort else list(cohort)
        if seed == 1:
            rule.hypernet.add_client("late", 25)
            reference.add_client("late", 25, rule.hypernet.embeddings["late"].detach())
        updates = [
            Update(c, torch.randn(rule.hypernet.num_parameters(c), generator=_random(seed, i)))
            for i, c in enumerate(ids)
        ]
        rule.step(updates, progress=0.0)
        reference.step([(u.client_id, u.delta, u.weight) for u in updates])
        assert_same(rule, reference)


def test_the_global_model_agrees_with_the_reference() -> None:
    rule = make()
    reference = reference_of(rule, AT_REST, rounds=10)
    for seed in range(3):
        replies = {c: torch.randn(30, generator=_random(seed, i)) for i, c in enumerate("ab")}
        updates = [Update(c, d, weight=1.0 + 2 * (c == "b")) for c, d in replies.items()]
        rule.step_global("g", updates, progress=0.0)
        mean = (replies["a"] + 3 * replies["b"]) / 4
        reference.step([("g", mean, 1.0)], is_global=True)
        personal = deltas(50 + seed, "ca")
        rule.step([Update(c, d) for c, d in personal.items()], progress=0.0)
        reference.step([(c, d, 1.0) for c, d in personal.items()])
        assert_same(rule, reference)


# --- in closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", ["cd", GROUP])
def test_theta_moves_by_the_shared_and_the_personal_gain(buffer: str) -> None:
    change = deltas(1, buffer)
    got = go(make(EXACT), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    part = len(buffer) / 5  # of a pass over the group
    own = {c: padded(delta) - part * mean for c, delta in change.items()}
    common = torch.stack([*own.values()]).sum(0) / 5  # weights act on centred features
    shared = -GAIN * part * (1 + BETA**part * part) * mean
    for client_id in GROUP:  # who was not in the buffer moves by what is shared
        personal = own.get(client_id, torch.zeros(30)) - common
        assert_close(got[client_id], shared - OWN * personal)
    assert torch.equal(got["z"], torch.zeros(8))


def test_equal_embeddings_learn_what_is_shared_and_nothing_else() -> None:
    change = deltas(1, GROUP)
    got = go(make(EXACT, TOY.model_copy(update={"embedding_std": 0.0})), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    for client_id in change:
        expected = -GAIN * (1 + BETA) * mean[: SIZES[client_id]]
        # features that rounding alone tells apart are divided by next to nothing
        torch.testing.assert_close(got[client_id], expected, rtol=0, atol=1e-3)


def test_no_step_has_a_gain_above_one() -> None:
    section = EXACT.model_copy(update={"personal_gain": 0.0, "shared_gain": 3.0})
    change = deltas(1, GROUP)
    got = go(make(section), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    assert_close(got["a"], -(1 + BETA) * mean)


def test_shared_heads_start_everybody_from_one_model() -> None:
    thetas = make().hypernet.generate(list("cabd"))
    torch.testing.assert_close(thetas["c"], thetas["b"], rtol=0, atol=1e-6)
    torch.testing.assert_close(thetas["c"], thetas["d"][:27], rtol=0, atol=1e-6)


# --- the ridge solution --------------------------------------------------------------------------


@pytest.mark.parametrize("num_clients", [1, 5, 32, 40])
def test_ridge_rows_equal_the_formula_in_both_spaces(num_clients: int) -> None:
    generator = torch.Generator().manual_seed(num_clients)
    features = torch.randn(2, num_clients, 32, generator=generator)
    got = ridge_rows(features, 0.05)
    centred = features.double() - features.double().mean(1, keepdim=True)
    for chunk, solved in zip(centred, got, strict=True):
        damping = 1e-30 + 0.05 * chunk.square().sum(1).mean()
        kernel = chunk @ chunk.T + damping * torch.eye(num_clients, dtype=torch.float64)
        expected = torch.linalg.inv(kernel) @ chunk * 1.05
        torch.testing.assert_close(solved.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_clients", [4, 5, 7, 50])
def test_features_that_differ_by_rounding_alone_are_equal(num_clients: int) -> None:
    row = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1)).abs()
    assert float(ridge_rows(row.repeat(1, num_clients, 1), 1e-3).abs().max()) < 1e-6


# --- state and safety ----------------------------------------------------------------------------


def test_frozen_groups_stay_and_embeddings_learn() -> None:
    rule = make(AT_REST.model_copy(update={"embedding_lr": 0.1}))
    go(rule, deltas(1, GROUP))
    rule.freeze(["3"])
    weight = rule.hypernet.groups["3"].weight.clone()
    got = go(rule, deltas(2, "cz"))
    assert torch.equal(rule.hypernet.groups["3"].weight, weight)
    assert float(got["c"].abs().max()) > 0
    assert torch.equal(got["a"], torch.zeros(21))
    assert float(got["z"].abs().max()) > 0


@pytest.mark.parametrize("section", [AT_REST, LEARNING], ids=["at rest", "learning"])
def test_reading_changes_nothing(section: UpdateSection) -> None:
    read, undisturbed = make(section), make(section)
    for seed, cohort in enumerate(("ca", "bzc", "abz")):
        updates = [Update(c, d) for c, d in deltas(seed, cohort).items()]
        read.step(updates, progress=0.0)
        undisturbed.step(updates, progress=0.0)
        read.hypernet.state_dict()  # a checkpoint and a look after every step
        read.state_dict()
        read.hypernet.generate(list(SIZES))
    assert_all_equal(read.hypernet.named_parameters(), undisturbed.hypernet.named_parameters())


def test_the_order_of_arrival_does_not_matter() -> None:
    def run(order: str) -> Rule:
        hypernet = Hypernetwork(TOY, seed=3)
        for client_id in order:
            hypernet.add_client(client_id, SIZES[client_id])
        rule = make_rule(hypernet, AT_REST, total_rounds=10)
        change = deltas(1, sorted(SIZES))
        for _ in range(2):
            rule.step([Update(c, change[c]) for c in order], progress=0.0)
        return rule

    assert_all_equal(*(run(order).hypernet.named_parameters() for order in ("cabdzg", "zgdbac")))


@pytest.mark.parametrize("section", [AT_REST, LEARNING], ids=["at rest", "learning"])
def test_a_delta_that_is_not_finite_moves_nothing(section: UpdateSection) -> None:
    rule, change = make(section), deltas(1, "caz")
    change["a"][3] = float("nan")
    before = {n: p.detach().clone() for n, p in rule.hypernet.named_parameters().items()}
    assert not rule.step([Update(c, d) for c, d in change.items()], progress=0.0).applied
    assert_all_equal(rule.hypernet.named_parameters(), before)


def test_diagnostics_say_how_far_theta_went() -> None:
    rule = make(EXACT.model_copy(update={"personal_gain": 0.0}))
    change = {c: torch.full((SIZES[c],), 0.5) for c in GROUP}
    done = rule.step([Update(c, d) for c, d in change.items()], progress=0.0)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)  # 0.5, less in the last chunk
    went = GAIN * (1 + BETA) * torch.cat([mean[: len(d)] for d in change.values()])
    assert done.rms_theta_change == pytest.approx(float(went.square().mean().sqrt()), rel=1e-5)
    assert done.effective_rate == pytest.approx(done.rms_theta_change / 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("num_clients", "rounds", "beta", "own"),
    [
        (1, 60, 0.0, 1.0),
        (4, 60, 0.0, 0.35),
        (10, 30, 0.5, 0.14),
        (50, 60, 0.9, 0.028),
        (50, 300, 0.9, 0.028),
        (100, 20, 0.7, 0.08),  # a short run: there is no time for more
        (50, 4, 0.0, 0.4),
    ],
)
def test_gains_fit_the_number_of_clients_and_of_rounds(
    num_clients: int, rounds: int, beta: float, own: float
) -> None:
    found = gains(FITTED, num_clients=num_clients, rounds=rounds)
    assert found == pytest.approx((beta, own))
    assert gains(AT_REST, num_clients=num_clients, rounds=rounds) == (BETA, OWN)


def test_a_negative_gain_is_refused() -> None:
    for key in ("personal-gain", "shared-momentum"):
        with pytest.raises(ConfigError, match=f"{key} = -0.5 .*set 0 or more, or -1"):
            RunConfig.parse({key: -0.5})


@pytest.mark.parametrize(("hidden", "named"), [(3, True), (4, False)])
def test_more_clients_than_heads_can_tell_apart_are_named_once(
    hidden: int, named: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    rule = make(shape=TOY.model_copy(update={"hidden_dim": hidden}))
    for seed in (1, 2):
        go(rule, deltas(seed, SIZES))
    found = [record.message for record in caplog.records if "hidden-dim" in record.message]
    assert len(found) == int(named)
