"""The least-squares rule: theta moves as asked, whoever is in the buffer."""

import logging

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, RunConfig, UpdateSection
from common.errors import ConfigError
from server_app.aggregation.adam import ClientUpdate, ServerUpdate
from server_app.aggregation.least_squares import Pace
from server_app.aggregation.ridge import ridge_rows
from server_app.hypernet.network import Hypernetwork

pytestmark = pytest.mark.numeric

TOY = HypernetSection(
    chunk_size=10, embed_dim=16, hidden_dim=32, embedding_std=2.0, head_init="shared"
)
GAIN, BETA, OWN = 0.8, 0.6, 0.3
STILL = 1e-30
"""A rate at which trunk and embeddings do not move."""
SECTION = UpdateSection(
    server_rule="least-squares",
    shared_gain=GAIN,
    shared_momentum=BETA,
    personal_gain=OWN,
    kernel_damping=1e-9,
    server_lr=STILL,
    embedding_lr=STILL,
)
SIZES = {"c": 27, "a": 21, "b": 27, "d": 30, "z": 8}
"""c, a, b, d share a head group of three chunks, the last one ragged; z has a group of its own."""


@pytest.fixture(params=[STILL, 0.0], ids=["heads", "ledger"], autouse=True)
def still(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with heads that move at once, and with a ledger, which 0 as a rate allows."""
    rates = {"server_lr": request.param, "embedding_lr": request.param}
    monkeypatch.setitem(globals(), "SECTION", SECTION.model_copy(update=rates))


def system(section: UpdateSection | None = None, shape: HypernetSection = TOY) -> ServerUpdate:
    hypernet = Hypernetwork(shape, seed=3)
    for client_id, size in SIZES.items():
        hypernet.add_client(client_id, size)
    return ServerUpdate(hypernet, section or SECTION, total_rounds=10)


def deltas(seed: int, *client_ids: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(SIZES[c], generator=generator) for c in client_ids}


def moved(update: ServerUpdate, change: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take a step; return how far every client's theta went, padded to its group's chunks."""
    before = update.hypernet.generate(list(SIZES))
    update.step([ClientUpdate(c, d) for c, d in change.items()], progress=0.0)
    after = update.hypernet.generate(list(SIZES))
    return {c: after[c] - before[c] for c in SIZES}


def padded(delta: Tensor) -> Tensor:
    return torch.cat([delta, torch.zeros(30 - len(delta))])


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected[: len(got)], rtol=0, atol=2e-5)


def test_theta_moves_by_the_shared_and_the_personal_gain() -> None:
    change = deltas(1, "c", "a", "b", "d")
    got = moved(system(), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    for client_id, delta in change.items():
        own = padded(delta) - mean
        assert_close(got[client_id], -GAIN * (1 + BETA) * mean - OWN * own)
    assert torch.equal(got["z"], torch.zeros(8))


def test_velocity_and_running_mean_carry_over() -> None:
    update, first, second = system(), deltas(1, "c", "a", "b", "d"), deltas(2, "c", "a", "b", "d")
    moved(update, first)
    got = moved(update, second)
    means = [torch.stack([padded(d) for d in x.values()]).mean(0) for x in (first, second)]
    velocity = BETA * means[0] + means[1]
    for client_id, delta in second.items():
        expected = -GAIN * (means[1] + BETA * velocity) - OWN * (padded(delta) - means[1])
        assert_close(got[client_id], expected)


def test_who_was_not_in_the_buffer_moves_by_what_is_shared() -> None:
    change = deltas(1, "c", "d")
    got = moved(system(), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    running = mean / 2  # two of the group's four clients: half a pass
    own = {c: padded(delta) - running for c, delta in change.items()}
    common = torch.stack([*own.values()]).sum(0) / 4  # weights act on centred features
    half, beta = GAIN / 2, BETA**0.5
    for client_id in "cabd":
        personal = own.get(client_id, torch.zeros(30)) - common
        assert_close(got[client_id], -half * (1 + beta / 2) * mean - OWN * personal)


def test_a_pass_in_pieces_goes_as_far_as_a_pass_at_once() -> None:
    section = SECTION.model_copy(update={"personal_gain": 0.0})
    steady = {c: torch.ones(SIZES[c]) for c in ("c", "a", "b", "d")}
    at_once, in_pieces = system(section), system(section)
    start = at_once.hypernet.generate(["b"])["b"]
    for _ in range(40):  # the velocity settles: 1 / (1 - beta) steps
        moved(at_once, steady)
        for pair in (("c", "b"), ("a", "d")):
            moved(in_pieces, {c: steady[c] for c in pair})
    far = [float((u.hypernet.generate(["b"])["b"] - start).mean()) for u in (at_once, in_pieces)]
    assert far[0] == pytest.approx(-40 * GAIN / (1 - BETA), rel=0.1)
    half = BETA**0.5
    assert far[1] / far[0] == pytest.approx((1 + half / 2 / (1 - half)) * (1 - BETA), rel=0.05)


@pytest.mark.parametrize("num_clients", [1, 5, 32, 40])
def test_ridge_rows_equal_the_formula_in_both_spaces(num_clients: int) -> None:
    generator = torch.Generator().manual_seed(num_clients)
    features = torch.randn(2, num_clients, 32, generator=generator)
    rows = [num_clients - 1, 0, 0]
    got = ridge_rows(features, rows, 0.05)
    centred = features.double() - features.double().mean(1, keepdim=True)
    for chunk, solved in zip(centred, got, strict=True):
        damping = 1e-30 + 0.05 * chunk.square().sum(1).mean()
        kernel = chunk @ chunk.T + damping * torch.eye(num_clients, dtype=torch.float64)
        expected = torch.linalg.inv(kernel) @ chunk * 1.05
        torch.testing.assert_close(solved.double(), expected[rows], rtol=1e-4, atol=1e-5)


def test_equal_embeddings_learn_what_is_shared_and_nothing_else() -> None:
    shape = TOY.model_copy(update={"embedding_std": 0.0})
    change = deltas(1, "c", "a", "b", "d")
    got = moved(system(shape=shape), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    for client_id in change:
        expected = -GAIN * (1 + BETA) * mean[: SIZES[client_id]]
        # features that rounding alone tells apart are divided by next to nothing
        torch.testing.assert_close(got[client_id], expected, rtol=0, atol=1e-3)


def test_shared_heads_start_everybody_from_one_model() -> None:
    thetas = system().hypernet.generate(list("cabd"))
    assert_close(thetas["c"], thetas["b"])
    assert_close(thetas["c"], thetas["d"][:27])


def test_frozen_groups_stay_and_embeddings_learn() -> None:
    section = SECTION.model_copy(update={"embedding_lr": 0.1})
    update = system(section)
    moved(update, deltas(1, "c", "a", "b", "d"))
    update.freeze(["3"])
    weight = update.hypernet.groups["3"].weight.clone()
    got = moved(update, deltas(2, "c", "z"))
    assert torch.equal(update.hypernet.groups["3"].weight, weight)
    assert float(got["c"].abs().max()) > 0
    assert torch.equal(got["a"], torch.zeros(21))
    assert float(got["z"].abs().max()) > 0


def test_resume_equals_no_interruption() -> None:
    section = SECTION.model_copy(update={"server_lr": 1e-3, "embedding_lr": 1e-2})
    whole, begun = system(section), system(section)
    for update in (whole, begun):
        moved(update, deltas(1, "c", "a"))
    state = {k: v.clone() for k, v in begun.hypernet.state_dict()[0].items()}
    hypernet = Hypernetwork(TOY, seed=0)
    hypernet.load_state_dict(state, begun.hypernet.state_dict()[1])
    resumed = ServerUpdate(hypernet, section, total_rounds=10)
    resumed.load_state_dict(*begun.state_dict())
    for update in (whole, resumed):
        moved(update, deltas(2, "b", "z", "c"))
    for name, parameter in whole.hypernet.named_parameters().items():
        assert torch.equal(parameter, resumed.hypernet.named_parameters()[name]), name


def test_diagnostics_say_how_far_theta_went() -> None:
    section = SECTION.model_copy(update={"personal_gain": 0.0})
    update = system(section)
    change = {c: torch.full((SIZES[c],), 0.5) for c in ("c", "a", "b", "d")}
    done = update.step([ClientUpdate(c, d) for c, d in change.items()], progress=0.0)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)  # 0.5, less in the last chunk
    went = GAIN * (1 + BETA) * torch.cat([mean[: len(d)] for d in change.values()])
    assert done.rms_theta_change == pytest.approx(float(went.square().mean().sqrt()), rel=1e-5)
    assert done.effective_rate == pytest.approx(done.rms_theta_change / 0.5, rel=1e-5)


def test_no_step_has_a_gain_above_one() -> None:
    section = SECTION.model_copy(update={"personal_gain": 0.0, "shared_gain": 3.0})
    change = deltas(1, "c", "a", "b", "d")
    got = moved(system(section), change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    assert_close(got["a"], -(1 + BETA) * mean)


def test_the_global_model_follows_its_mean_delta() -> None:
    update, change = system(), deltas(1, "c")["c"] / 4
    before = update.hypernet.generate(["c", "a"])
    replies = [ClientUpdate("a", change * 2, weight=1.0), ClientUpdate("b", change, weight=3.0)]
    update.step_global("c", replies, progress=0.0)
    after = update.hypernet.generate(["c", "a"])
    mean = padded(change * 1.25)  # one of four clients: a quarter of a pass
    shared = -GAIN / 4 * (1 + BETA**0.25 / 4) * mean
    own = mean - mean / 4
    assert_close(after["c"] - before["c"], shared - own * 3 / 4)
    assert_close(after["a"] - before["a"], shared + own / 4)


def test_the_order_of_arrival_does_not_matter() -> None:
    def run(order: str) -> ServerUpdate:
        hypernet = Hypernetwork(TOY, seed=3)
        for client_id in order:
            hypernet.add_client(client_id, SIZES[client_id])
        update = ServerUpdate(hypernet, SECTION, total_rounds=10)
        moved_by = deltas(1, *sorted(SIZES))
        for _ in range(2):
            updates = [ClientUpdate(c, moved_by[c]) for c in order]
            update.step(updates, progress=0.0)
        return update

    one, other = (run(order).hypernet.named_parameters() for order in ("cabdz", "zdbac"))
    assert all(torch.equal(parameter, other[name]) for name, parameter in one.items())


def test_a_delta_that_is_not_finite_moves_nothing() -> None:
    update, change = system(), deltas(1, "c", "a")
    change["a"][3] = float("nan")
    before = {n: p.detach().clone() for n, p in update.hypernet.named_parameters().items()}
    updates = [ClientUpdate(c, d) for c, d in change.items()]
    assert not update.step(updates, progress=0.0).applied
    for name, parameter in update.hypernet.named_parameters().items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("num_clients", [4, 5, 7, 50])
def test_features_that_differ_by_rounding_alone_are_equal(num_clients: int) -> None:
    row = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1)).abs()
    assert float(ridge_rows(row.repeat(1, num_clients, 1), [0], 1e-3).abs().max()) < 1e-6


def test_a_ledger_and_heads_that_move_at_once_agree() -> None:
    """Cohorts, a client twice in a buffer, somebody new, somebody gone, a checkpoint."""

    def run(rate: float) -> dict[str, Tensor]:
        rates = {"server_lr": rate, "embedding_lr": rate, "kernel_damping": 0.05}
        update = system(SECTION.model_copy(update=rates))
        hypernet = update.hypernet
        for turn, cohort in enumerate(("ca", "bdz", "cabdz", "cc", "db")):
            changes = [deltas(10 * turn + i, c)[c] for i, c in enumerate(cohort)]
            update.step(
                [ClientUpdate(c, d) for c, d in zip(cohort, changes, strict=True)], progress=0
            )
            if turn == 0:
                hypernet.add_client("new", 25)
            if turn == 1:
                assert hypernet.state_dict()[0]["heads.3.weight"].abs().max() > 0
            if turn == 2:
                hypernet.remove_client("a")
        assert (hypernet.groups["3"].ledger is None) == (rate == STILL)
        emitted = hypernet.generate(["b", "new", "c", "d", "z"])
        return emitted | {f"settled {c}": x for c, x in settled(hypernet).items()}

    def settled(hypernet: Hypernetwork) -> dict[str, Tensor]:
        for group in hypernet.groups.values():
            assert group.weight.isfinite().all()
            assert group.ledger is None
        return hypernet.generate(hypernet.clients())

    heads, ledger = run(STILL), run(0.0)
    for client_id, theta in heads.items():
        assert_close(ledger[client_id], theta)


def test_more_clients_than_hidden_dim_keep_no_ledger() -> None:
    section = SECTION.model_copy(update={"server_lr": 0.0, "embedding_lr": 0.0})
    update = system(section, TOY.model_copy(update={"hidden_dim": 3}))
    moved(update, deltas(1, "c", "a", "b", "d"))
    assert update.hypernet.groups["3"].ledger is None


@pytest.mark.parametrize(
    ("num_clients", "rounds", "beta", "own"),
    [
        (1, 60, 0.0, 1.0),
        (4, 60, 0.0, 0.35),
        (10, 30, 0.5, 0.14),
        (50, 60, 0.9, 0.028),
        (50, 300, 0.9, 0.028),
        (100, 300, 0.95, 0.014),
        (100, 20, 0.7, 0.08),  # a short run: there is no time for more
        (50, 4, 0.0, 0.4),
    ],
)
def test_gains_fit_the_number_of_clients_and_of_rounds(
    num_clients: int, rounds: int, beta: float, own: float
) -> None:
    left_alone = UpdateSection(server_rule="least-squares")
    for section, factors in ((left_alone, (beta, own)), (SECTION, (BETA, OWN))):
        pace = Pace(0.5, rounds)
        assert pace.momentum(section, num_clients) == pytest.approx(factors[0])
        assert pace.personal_gain(section, num_clients) == pytest.approx(0.5 * factors[1])
        assert Pace(0.5, follows=True).personal_gain(section, num_clients) == 0.5


def test_a_negative_gain_is_refused() -> None:
    for key in ("personal-gain", "shared-momentum"):
        with pytest.raises(ConfigError, match=f"{key} = -0.5 .*set 0 or more, or -1"):
            RunConfig.parse({key: -0.5})


@pytest.mark.parametrize(("hidden", "named"), [(2, True), (3, False)])
def test_more_clients_than_heads_can_tell_apart_are_named_once(
    hidden: int, named: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    update = system(shape=TOY.model_copy(update={"hidden_dim": hidden}))
    for seed in (1, 2):
        moved(update, deltas(seed, "c", "a", "b", "d", "z"))
    found = [record.message for record in caplog.records if "hidden-dim" in record.message]
    assert len(found) == named
    if named:
        assert "4 clients share heads of hidden-dim 2: some 67 %" in found[0]
        assert "hidden-dim to 3 or more" in found[0]


@pytest.mark.parametrize(("rounds", "own_gain"), [(60, 0.35), (2, 0.8)])
def test_a_short_run_follows_more_of_what_is_personal(rounds: int, own_gain: float) -> None:
    left_alone = {"shared_momentum": -1.0, "personal_gain": -1.0}
    update = system(SECTION.model_copy(update=left_alone))
    update = ServerUpdate(update.hypernet, update.section, total_rounds=rounds)
    change = deltas(1, "c", "a", "b", "d")
    got = moved(update, change)
    mean = torch.stack([padded(d) for d in change.values()]).mean(0)
    for client_id, delta in change.items():
        assert_close(got[client_id], -GAIN * mean - own_gain * (padded(delta) - mean))
