"""Which clients share heads, in the hypernetwork and in both rules."""

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, UpdateSection
from common.errors import CheckpointError
from server_app.aggregation import make_network, make_rule
from server_app.hypernet.groups import Update, head_group
from server_app.hypernet.network import Hypernetwork
from tests.support.close import assert_all_equal
from tests.support.pulls import pull

pytestmark = pytest.mark.numeric

SIZES = {"d": 57, "a": 7, "c": 30, "b": 60, "e": 28}  # 6, 1, 3, 6 and 3 chunks of 10
ADAM = UpdateSection(server_rule="adam", server_lr=0.01, embedding_lr=0.01)
KERNEL = UpdateSection(server_rule="kernel")


def section(sharing: str, **changes: object) -> HypernetSection:
    values = {"chunk_size": 10, "embed_dim": 4, "hidden_dim": 8, "embedding_std": 0.5}
    return HypernetSection(**{**values, "head_sharing": sharing, **changes})


def make(
    sharing: str, sizes: dict[str, int] = SIZES, *, rule: str = "adam", **changes: object
) -> Any:
    hypernet = make_network(rule, section(sharing, **changes), seed=3)
    for client_id, size in sizes.items():
        hypernet.add_client(client_id, size, tag="7a" if client_id in "de" else "7b")
    return hypernet


def updates(seed: int, *clients: str) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [Update(c, torch.randn(SIZES[c], generator=generator)) for c in clients]


def emitted(hypernet: Hypernetwork, client_id: str) -> Tensor:
    """theta (P,) chunk by chunk, with a graph."""
    group = hypernet.groups[hypernet.group_key(client_id)]
    features = hypernet.trunk(hypernet.embeddings[client_id])
    chunks = [f @ group.weight[i] + group.bias[i] for i, f in enumerate(features)]
    return torch.cat(chunks)[: SIZES[client_id]]


GROUPS = {
    "chunks": {"1": "a", "3": "ce", "6": "bd"},
    "tolerance": {"1": "a", "4": "ce", "10": "bd"},
    "tag": {"1-7b": "a", "3-7a": "e", "3-7b": "c", "6-7a": "d", "6-7b": "b"},
    "own": {"1-a": "a", "3-c": "c", "3-e": "e", "6-b": "b", "6-d": "d"},
}


@pytest.mark.parametrize("sharing", GROUPS)
def test_who_shares_and_that_both_directions_are_exact(sharing: str) -> None:
    hypernet = make(sharing, sharing_tolerance=1.0)
    found = {key: "".join(hypernet.members(key)) for key in hypernet.groups}
    assert found == GROUPS[sharing]
    thetas = hypernet.generate(list(SIZES))
    deltas = {u.client_id: u.delta for u in updates(1, *SIZES)}
    for client_id, theta in thetas.items():
        torch.testing.assert_close(theta, emitted(hypernet, client_id), rtol=1e-5, atol=1e-6)
    for members in found.values():  # a group's heads get the mean over its clients
        mean = sum(emitted(hypernet, c) @ deltas[c] for c in members) / len(members)
        key = hypernet.group_key(members[0])
        group = hypernet.groups[key]
        expected = torch.autograd.grad(mean, [group.weight, group.bias])
        embeddings = [hypernet.embeddings[c] for c in members]
        total = sum(emitted(hypernet, c) @ deltas[c] for c in members) / len(SIZES)
        own = torch.autograd.grad(total, embeddings)
        pull(hypernet, *[(c, deltas[c], 1 / len(SIZES)) for c in SIZES])
        touched = (group.weight, group.bias, *embeddings)
        for got, wanted in zip(touched, (*expected, *own), strict=True):
            torch.testing.assert_close(got.grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", GROUPS)
def test_nothing_depends_on_the_order_of_arrival(sharing: str) -> None:
    first, second = make(sharing), make(sharing, dict(reversed(SIZES.items())))
    assert list(first.named_parameters())[:6] == list(second.named_parameters())[:6]
    for name, parameter in first.named_parameters().items():
        assert torch.equal(parameter, second.named_parameters()[name]), name


def test_another_tag_is_another_model() -> None:
    hypernet = make("tag")
    assert hypernet.is_same("c", 30, "7b")
    assert not hypernet.is_same("c", 30, "7a")
    assert not hypernet.is_same("c", 31, "7b")
    assert make("chunks").is_same("c", 30, "7a")


@pytest.mark.parametrize(
    ("sharing", "rule"),
    [(sharing, rule) for sharing in GROUPS for rule in (ADAM, KERNEL)],
)
def test_restored_state_goes_on_as_if_nothing_had_happened(
    sharing: str, rule: UpdateSection
) -> None:
    update = make_rule(make(sharing, rule=rule.server_rule), rule, total_rounds=9)
    update.step(updates(1, *SIZES), progress=0.0)
    tensors, meta = update.hypernet.state_dict()
    memory, learning = update.state_dict()
    saved = tensors | memory
    again = make_rule(make(sharing, {}, rule=rule.server_rule), rule, total_rounds=9)
    again.hypernet.load_state_dict(saved, json.loads(json.dumps(meta)))
    again.load_state_dict(saved, json.loads(json.dumps(learning)))
    for one in (update, again):
        one.hypernet.add_client("late", 95, tag="7b")
        one.step(updates(2, "e", "a", "c"), progress=1.0)
    for name, parameter in update.hypernet.named_parameters().items():
        other = again.hypernet.named_parameters()[name]
        assert torch.equal(parameter, other), name
        assert parameter.data_ptr() != other.data_ptr()
    assert_all_equal(update.state_dict()[0], again.state_dict()[0])


def test_state_of_another_criterion_is_refused() -> None:
    with pytest.raises(CheckpointError, match="head-sharing = chunks; this run has own"):
        Hypernetwork(section("own"), seed=3).load_state_dict(*make("chunks").state_dict())


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.25, 1.0, 3.0])
def test_size_classes_are_runs_of_at_most_the_tolerance(tolerance: float) -> None:
    tolerant = section("tolerance", sharing_tolerance=tolerance)
    largest = [head_group(tolerant, "a", chunks)[1] for chunks in range(1, 2000)]
    for top, run in itertools.groupby(range(1, 2000), key=lambda c: largest[c - 1]):
        smallest = next(run)
        assert smallest <= top <= max(smallest, smallest * (1 + tolerance))
    assert largest == sorted(largest)
    assert head_group(tolerant, "a", 7) == head_group(tolerant, "b", largest[6])
