"""The hypernetwork: sizes, order of arrival, generation, pull-back, state."""

import math

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection
from common.errors import CheckpointError, RegistrationError
from server_app.hypernet import network
from server_app.hypernet.base import BLOCK_BYTES, LEAST_CLIENTS, blocks
from server_app.hypernet.network import Hypernetwork
from tests.reference.algorithm import Hyper, ReferenceHypernet
from tests.support.pulls import pull

pytestmark = pytest.mark.numeric

TOY = HypernetSection(chunk_size=10, embed_dim=4, hidden_dim=8, embedding_std=0.5)
# one chunk, exact last chunk, ragged last chunk, two clients of one group; not in ascending order
SIZES = {"d": 57, "a": 7, "c": 30, "b": 60, "e": 28}


def make(sizes: dict[str, int], section: HypernetSection = TOY, seed: int = 3) -> Hypernetwork:
    hypernet = Hypernetwork(section, seed=seed)
    for client_id, size in sizes.items():
        hypernet.add_client(client_id, size)
    return hypernet


def random_deltas(sizes: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {c: torch.randn(size, generator=generator) for c, size in sizes.items()}


def reference_of(hypernet: Hypernetwork) -> ReferenceHypernet:
    return ReferenceHypernet(*hypernet.state_dict(), hyper=Hyper())


def test_published_shape_has_41344_trunk_parameters() -> None:
    hypernet = Hypernetwork(HypernetSection(embed_dim=64, hidden_dim=128), seed=0)
    assert sum(p.numel() for p in hypernet.trunk.parameters()) == 41_344


def test_generate_equals_the_heads_one_by_one() -> None:
    hypernet = make(SIZES)
    reference = reference_of(hypernet)
    thetas = hypernet.generate(["b", "a", "e", "d", "c"])
    assert list(thetas) == ["b", "a", "e", "d", "c"]
    for client_id, theta in thetas.items():
        assert theta.shape == (SIZES[client_id],)
        assert theta.dtype == torch.float32
        assert not theta.requires_grad
        assert theta.is_contiguous()
        torch.testing.assert_close(theta, reference.theta(client_id), rtol=1e-5, atol=1e-6)
    assert hypernet.generate([]) == {}


def test_initialisation_is_torchs_default_for_linear() -> None:
    hypernet = make({"a": 3000}, HypernetSection(chunk_size=500, embed_dim=16, hidden_dim=32))
    group = hypernet.groups["6"]
    bound = 1 / math.sqrt(32)
    for tensor in (group.weight, group.bias, hypernet.trunk[2].weight):
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert hypernet.embeddings["a"].std().item() == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("tile_bytes", [1, 500, network.TILE_BYTES])
def test_backward_equals_autograd(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TILE_BYTES", tile_bytes)
    hypernet, deltas = make(SIZES), random_deltas(SIZES)
    reference = reference_of(hypernet)
    shares = {"d": 0.1, "a": 0.2, "c": 0.3, "b": 0.25, "e": 0.15}
    expected = reference.step(deltas, shares).gradients
    pull(hypernet, *[(c, deltas[c], shares[c]) for c in SIZES])
    got = {n: p.grad for n, p in hypernet.named_parameters().items() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_clients_come_and_go() -> None:
    hypernet = make({"a": 27})
    before = hypernet.generate(["a"])["a"]
    hypernet.add_client("b", 12)
    assert hypernet.clients() == ["a", "b"]
    assert (hypernet.num_parameters("b"), hypernet.num_chunks("b")) == (12, 2)
    assert torch.equal(hypernet.generate(["a"])["a"], before)
    hypernet.remove_client("a")
    assert not hypernet.has_client("a")
    assert sorted(hypernet.groups) == ["2", "3"]
    hypernet.add_client("a", 15)
    assert hypernet.generate(["a"])["a"].shape == (15,)


def test_errors_say_what_to_do() -> None:
    hypernet = make({"a": 27}, HypernetSection(chunk_size=10, max_parameters=100))
    with pytest.raises(RegistrationError, match=r"'b' asks for 101 parameters; 1 to 100 are allo"):
        hypernet.add_client("b", 101)
    with pytest.raises(RegistrationError, match="'b' asks for 0 parameters"):
        hypernet.add_client("b", 0)
    assert not hypernet.has_client("b")
    assert list(hypernet.groups) == ["3"]
    with pytest.raises(RegistrationError, match="'a' has an embedding for 27 parameters already"):
        hypernet.add_client("a", 5)
    with pytest.raises(RegistrationError, match=r"no embedding for client 'z'.*Known: a\."):
        hypernet.generate(["a", "z"])
    with pytest.raises(ValueError, match=r"client 'a' has shape \(30,\); its theta has \(27,\)"):
        pull(hypernet, *[("a", torch.ones(30), 1.0)])


def test_a_state_that_does_not_fit_is_refused() -> None:
    tensors, meta = make({"a": 27}).state_dict()
    other = TOY.model_copy(update={"hidden_dim": 9})
    with pytest.raises(CheckpointError, match="written with hidden-dim = 8; this run has 9"):
        Hypernetwork(other, seed=0).load_state_dict(tensors, meta)
    with pytest.raises(
        CheckpointError, match=r"into an empty hypernetwork; this one has clients b"
    ):
        make({"b": 1}).load_state_dict(tensors, meta)
    missing = {name: t for name, t in tensors.items() if name != "heads.3.bias"}
    with pytest.raises(CheckpointError, match=r"no tensor 'heads\.3\.bias'"):
        Hypernetwork(TOY, seed=0).load_state_dict(missing, meta)
    bad = tensors | {"embeddings.a": torch.zeros(2, 4)}
    with pytest.raises(
        CheckpointError, match=r"'embeddings\.a' .* shape \(2, 4\); expected \(3, 4"
    ):
        Hypernetwork(TOY, seed=0).load_state_dict(bad, meta)


@pytest.mark.parametrize("size", [20, 57])
def test_the_norm_is_that_of_the_gradients(size: int) -> None:
    hypernet = make({"a": size, "b": size, "c": size, "d": 2 * size})
    deltas = random_deltas({c: hypernet.num_parameters(c) for c in "abcd"})
    found = pull(hypernet, *[(c, deltas[c], 0.25) for c in "abcd"])
    gradients = [p.grad.double().flatten() for p in (*found.shared, *found.embeddings)]
    assert found.norm == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-6)
    deltas["b"][3] = math.nan
    assert math.isnan(pull(hypernet, *[(c, deltas[c], 0.25) for c in "abcd"]).norm)


def test_some_chunks_are_those_of_the_whole() -> None:
    hypernet = make({"a": 57, "b": 60, "c": 51})
    whole = hypernet.generate("abc")
    for client_id, some in hypernet.generate("abc", [0, 2, 5]).items():
        chunks = whole[client_id].split(10)
        expected = torch.cat([chunks[i] for i in (0, 2, 5)])
        torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-6)  # other products


def test_thetas_come_block_by_block_as_numpy() -> None:
    hypernet = make(SIZES)
    found = dict(hypernet.thetas(list(SIZES)))
    for client_id, theta in hypernet.generate(list(SIZES)).items():
        assert torch.equal(torch.from_numpy(found[client_id]), theta)


def test_blocks_are_of_nearly_equal_size_and_bounded_in_bytes() -> None:
    ids = [str(i) for i in range(520)]
    cut = [list(block) for block in blocks(ids, lambda _: 1000)]
    assert [len(block) for block in cut] == [173, 173, 174]
    assert [client_id for block in cut for client_id in block] == ids
    largest = BLOCK_BYTES // 4 // 20
    assert {len(block) for block in blocks(ids, lambda _: largest)} <= {19, 20}
    assert max(len(block) for block in blocks(ids, lambda _: 2**40)) <= LEAST_CLIENTS
    assert list(blocks([], lambda _: 1)) == []
