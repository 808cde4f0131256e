"""The kernel rule and its network, held against the slow reference."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, UpdateSection
from common.errors import CheckpointError
from server_app.aggregation.kernel import KernelRule
from server_app.hypernet.groups import Update
from server_app.hypernet.kernel import KernelNetwork
from tests.reference.kernel import ReferenceGroup
from tests.support.close import assert_all_equal

pytestmark = pytest.mark.numeric

SECTION = HypernetSection(chunk_size=10, embed_dim=16)
TOLERANT = SECTION.model_copy(update={"head_sharing": "tolerance", "sharing_tolerance": 1.0})
STEADY = UpdateSection(server_rule="kernel", lr_decay_from=1.0)
SIZES = {f"c{i}": 25 + i % 4 for i in range(7)}  # 3 chunks each
MIXED = {"a": 55, "b": 100, "c": 57, "d": 72, "e": 99}  # 6 to 10 chunks, in one class of sizes


def made(sizes: dict[str, int] = SIZES, shape: HypernetSection = SECTION) -> KernelRule:
    network = KernelNetwork(shape, seed=3)
    for client_id, size in sizes.items():
        network.add_client(client_id, size)
    return KernelRule(network, STEADY, total_rounds=10)


def reference(rule: KernelRule, key: str = "3") -> ReferenceGroup:
    group = rule.hypernet.groups[key]
    slow = ReferenceGroup(len(group.base), group.places.tolist(), group.signs.tolist(), 16)
    for client_id in rule.hypernet.members(key):
        slow.add_client(client_id, rule.hypernet.num_parameters(client_id))
    return slow


def everything(rule: KernelRule) -> dict[str, Tensor]:
    return rule.hypernet.state_dict()[0] | rule.state_dict()[0]


def drawn(seed: int, sizes: dict[str, int], *clients: str) -> list[tuple[str, Tensor, float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(c, torch.randn(sizes[c], generator=generator), 1.0 + i) for i, c in enumerate(clients)]


def both(rule: KernelRule, slow: ReferenceGroup, updates: list[tuple[str, Tensor, float]]) -> None:
    rule.step([Update(c, d, weight=w) for c, d, w in updates], progress=0.0)
    slow.step(updates)


def assert_equal(rule: KernelRule, slow: ReferenceGroup) -> None:
    thetas = rule.hypernet.generate(list(slow.sizes))
    for client_id, theta in thetas.items():
        torch.testing.assert_close(theta.double(), slow.theta(client_id), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [SIZES, MIXED], ids=["chunks", "tolerance"])
@pytest.mark.parametrize("buffer_size", [1, 3, 5, 7])
def test_every_schedule_agrees_with_the_reference(sizes: dict[str, int], buffer_size: int) -> None:
    rule = made(sizes, TOLERANT if sizes is MIXED else SECTION)
    (key,) = rule.hypernet.groups
    slow, names = reference(rule, key), list(sizes)
    both(rule, slow, drawn(99, sizes, *sizes))  # so that all are known to take part
    for step in range(12):
        chosen = [names[(step * buffer_size + i) % len(names)] for i in range(buffer_size)]
        both(rule, slow, drawn(step, sizes, *chosen))
        assert_equal(rule, slow)


def test_a_client_that_joins_late_and_one_that_leaves() -> None:
    rule = made()
    slow = reference(rule)
    both(rule, slow, drawn(1, SIZES, *SIZES))
    both(rule, slow, drawn(2, SIZES, *SIZES))
    sizes = {**SIZES, "late": 30}
    rule.hypernet.remove_client("c1")
    slow.remove_client("c1")
    rule.hypernet.add_client("late", 30)
    slow.add_client("late", 30)
    torch.testing.assert_close(
        rule.hypernet.generate(["late"])["late"].double(), slow.base, rtol=1e-5, atol=1e-6
    )
    both(rule, slow, drawn(3, sizes, "late", "c2", "c3"))
    assert_equal(rule, slow)


def test_a_client_alone_in_its_group_moves_by_its_own_delta() -> None:
    rule, expected = made({"a": 25, "b": 7}), torch.zeros(25)
    for seed in range(4):
        updates = drawn(seed, {"a": 25, "b": 7}, "a", "b")
        rule.step([Update(c, d) for c, d, _ in updates], progress=0.0)
        expected = expected - updates[0][1]
        torch.testing.assert_close(rule.hypernet.generate(["a"])["a"], expected)


def test_the_global_model_follows_its_mean_whole_and_resembles_nobody() -> None:
    rule = made()
    rule.hypernet.add_client("__global__", 28)
    slow = reference(rule)
    both(rule, slow, drawn(1, SIZES, *SIZES))
    first, second = (drawn(seed, {"__global__": 28}, "__global__")[0][1] for seed in (4, 5))
    rule.step_global("__global__", [Update("a", first), Update("b", second)], progress=0.0)
    slow.step([("__global__", (first + second) / 2, 1.0)], is_global=True)
    assert_equal(rule, slow)
    assert not rule.hypernet.embeddings["__global__"].any()


def test_equal_changes_come_to_be_shared_and_a_newcomer_takes_from_its_like() -> None:
    sizes = {f"c{i}": 30 for i in range(8)}
    rule, generator = made(sizes), torch.Generator().manual_seed(5)
    kind = torch.randn(30, generator=generator)

    def step(signs: dict[str, float]) -> None:
        changes = {
            c: s * kind + 0.3 * torch.randn(30, generator=generator) for c, s in signs.items()
        }
        rule.step([Update(c, change) for c, change in changes.items()], progress=0.0)

    signs = {c: (-1.0) ** i for i, c in enumerate(sizes)}
    for _ in range(6):
        step(signs)
    likeness = rule.hypernet.kernel("3", ["c0"])[1][0]
    assert likeness[[2, 4, 6]].min() > 0.15, "a quarter each where they are equal"
    assert likeness[[1, 3, 5, 7]].max() == 0
    rule.hypernet.add_client("new", 30)
    base = rule.hypernet.groups["3"].base
    torch.testing.assert_close(rule.hypernet.generate(["new"])["new"], base)
    for _ in range(3):
        step({**signs, "new": -1.0})
    thetas = {c: x - base for c, x in rule.hypernet.generate(["new", "c1"]).items()}
    own = rule.hypernet.personal["new"]
    assert float(thetas["new"] @ thetas["c1"]) > 0.7 * float(thetas["c1"].square().sum())
    assert float(own.norm()) < 0.6 * float(thetas["new"].norm()), "most of it is from others"


def test_in_a_frozen_group_a_new_clients_embedding_alone_learns() -> None:
    rule = made()
    slow = reference(rule)
    for seed in range(3):
        both(rule, slow, drawn(seed, SIZES, *SIZES))
    rule.freeze(["3"])
    kept = {name: x.clone() for name, x in everything(rule).items()}
    rule.hypernet.add_client("new", 26)
    slow.add_client("new", 26)
    rule.hypernet.add_client("other", 7)  # a new group
    update = drawn(7, {"new": 26}, "new")
    rule.step([Update("new", update[0][1]), Update("other", torch.ones(7))], progress=0.0)
    slow.step(update, frozen=True)
    assert_equal(rule, slow)
    assert not rule.hypernet.personal["new"].any()
    assert rule.hypernet.embeddings["new"].any()
    assert torch.equal(rule.hypernet.generate(["other"])["other"], -torch.ones(7))
    assert all(torch.equal(everything(rule)[name], x) for name, x in kept.items())


def test_neither_who_came_first_nor_reading_changes_a_bit() -> None:
    first, second = made(), made(dict(reversed(SIZES.items())))
    for seed in range(3):
        updates = [Update(c, d) for c, d, _ in drawn(seed, SIZES, *SIZES)]
        first.step(updates, progress=0.0)
        second.hypernet.generate(["c3", "c0"])
        second.state_dict()
        second.step(updates[::-1], progress=0.0)
    assert_all_equal(everything(first), everything(second))
    assert_all_equal(*(rule.hypernet.generate(list(SIZES)) for rule in (first, second)))


def test_in_a_frozen_group_that_never_stepped_a_new_client_is_told_from_others() -> None:
    rule = made()
    rule.freeze(["3"])
    rule.step([Update("c0", drawn(1, SIZES, "c0")[0][1])], progress=0.0)
    assert rule.hypernet.embeddings["c0"].any()
    assert not rule.hypernet.personal["c0"].any()


def test_a_restored_state_goes_on_bit_by_bit() -> None:
    first, second = made(), made({})
    first.step([Update(c, d) for c, d, _ in drawn(1, SIZES, *SIZES)], progress=0.0)
    first.hypernet.remove_client("c2")
    first.hypernet.add_client("d", 29)
    for of_first, of_second in ((first.hypernet, second.hypernet), (first, second)):
        tensors, facts = of_first.state_dict()
        of_second.load_state_dict({k: x.clone() for k, x in tensors.items()}, facts)
    sizes = {**SIZES, "d": 29}
    updates = [Update(c, d) for c, d, _ in drawn(2, sizes, "d", "c0", "c5")]
    for rule in (first, second):
        rule.step(updates, progress=0.0)
    assert_all_equal(everything(first), everything(second))
    names = first.hypernet.clients()
    assert_all_equal(*(rule.hypernet.generate(names) for rule in (first, second)))
    other = KernelNetwork(SECTION.model_copy(update={"embed_dim": 8}), seed=3)
    with pytest.raises(CheckpointError, match="embed-dim"):
        other.load_state_dict(*first.hypernet.state_dict())


def test_some_chunks_are_those_of_the_whole() -> None:
    rule = made()
    rule.step([Update(c, d) for c, d, _ in drawn(1, SIZES, *SIZES)], progress=0.0)
    whole, part = rule.hypernet.generate(["c1"]), rule.hypernet.generate(["c1"], [0, 2])
    torch.testing.assert_close(part["c1"], torch.cat([whole["c1"][:10], whole["c1"][20:]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_delta_that_is_not_finite_moves_nothing(bad: float) -> None:
    rule = made()
    before = {c: x.clone() for c, x in rule.hypernet.generate(list(SIZES)).items()}
    done = rule.step([Update("c0", torch.full((25,), bad))], progress=0.0)
    assert not done.applied
    after = rule.hypernet.generate(list(SIZES))
    assert all(torch.equal(after[c], before[c]) for c in SIZES)


def test_what_memory_does_not_hold_lies_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All that is learned is the same bit by bit, and a client that leaves gives its place back."""

    def trained() -> KernelRule:
        rule = made()
        rule.hypernet.add_client("only", 55)  # alone in its group: it keeps to itself
        for seed in range(3):
            updates = drawn(seed, SIZES | {"only": 55}, *SIZES, "only")
            rule.step([Update(c, d, weight=w) for c, d, w in updates], progress=0.0)
        return rule

    in_memory = trained()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("server_app.hypernet.kernel.memory_bytes", lambda: 700)
    with caplog.at_level("INFO", logger="flwr"):
        on_disk = trained()
    assert "from client c3 on they lie on disk" in caplog.text
    assert mapped(tmp_path) == 6  # c3 to c6, and of "only" what others may take and what not
    assert not list(tmp_path.iterdir())  # nothing is left behind, however the process ends
    assert_all_equal(everything(on_disk), everything(in_memory))

    restored = made({})
    restored.hypernet.load_state_dict(*on_disk.hypernet.state_dict())
    assert mapped(tmp_path) == 12
    assert_all_equal(restored.hypernet.state_dict()[0], on_disk.hypernet.state_dict()[0])
    for client_id in restored.hypernet.clients():
        restored.hypernet.remove_client(client_id)
    assert mapped(tmp_path) == 6


def mapped(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{folder}/mh-pfedhn-")


def test_a_disk_without_a_place_leaves_vectors_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("server_app.hypernet.kernel.memory_bytes", lambda: 0)
    with caplog.at_level("WARNING", logger="flwr"):
        rule = made({"a": 25})
    assert "No place on" in caplog.text
    assert not rule.hypernet.personal["a"].any()


def test_a_group_keeps_three_vectors_and_one_for_each_client() -> None:
    rule = made({f"c{i}": 100 for i in range(5)})
    updates = [Update(f"c{i}", torch.ones(100)) for i in range(5)]
    rule.step(updates, progress=0.0)
    small = ("embeddings.", "newest.")
    kept = sum(x.numel() for name, x in everything(rule).items() if not name.startswith(small))
    assert kept == (5 + 3) * 100
