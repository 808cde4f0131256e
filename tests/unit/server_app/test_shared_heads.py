"""One head for all chunks, bfloat16 products, and memory on huge pages."""

import math

import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, RunConfig, UpdateSection
from common.errors import CheckpointError, ConfigError
from server_app.aggregation.adam import ClientUpdate, ServerUpdate
from server_app.hypernet import heads
from server_app.hypernet.memory import HUGE_BYTES, fresh
from server_app.hypernet.network import Hypernetwork
from server_app.hypernet.pulls import Pull
from server_app.hypernet.shared_heads import place_rows

ONE = HypernetSection(
    chunk_size=10, embed_dim=4, hidden_dim=8, embedding_std=0.5, head_layout="one"
)
SIZES = {"d": 57, "a": 7, "c": 30, "b": 60, "e": 28}


def make(section: HypernetSection = ONE) -> Hypernetwork:
    hypernet = Hypernetwork(section, seed=3)
    for client_id, size in SIZES.items():
        hypernet.add_client(client_id, size)
    return hypernet


def plain_theta(hypernet: Hypernetwork, client_id: str) -> Tensor:
    group = hypernet.groups[hypernet.bank.key(client_id)]
    features = hypernet.trunk(hypernet.embeddings[client_id])
    return (features @ group.weight[0] + group.bias[0]).reshape(-1)[: SIZES[client_id]]


def test_generate_equals_one_linear_layer_for_every_chunk() -> None:
    hypernet = make()
    assert hypernet.groups["6"].weight.shape == (1, 8, 10)
    for client_id, theta in hypernet.generate(["b", "a", "e", "d", "c"]).items():
        expected = plain_theta(hypernet, client_id).detach()
        torch.testing.assert_close(theta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile_bytes", [heads.TILE_BYTES, 1])
def test_gradient_and_norm_equal_autograd(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "TILE_BYTES", tile_bytes)
    hypernet, ids = make(), ["d", "b"]
    generator = torch.Generator().manual_seed(1)
    deltas = {c: torch.randn(SIZES[c], generator=generator) for c in ids}
    loss = sum(plain_theta(hypernet, c) @ deltas[c] / 2 for c in ids)
    touched = [*hypernet.trunk.parameters(), *(hypernet.embeddings[c] for c in ids)]
    touched += [hypernet.groups["6"].weight, hypernet.groups["6"].bias]
    expected = torch.autograd.grad(loss, touched)
    pullback = hypernet.backward([Pull(c, deltas[c], 0.5) for c in ids])
    for parameter, gradient in zip(touched, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected))
    assert pullback.norm == pytest.approx(norm, rel=1e-5)


def test_places_are_the_same_for_all_and_chunks_differ() -> None:
    drawn = [place_rows(6, 4, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)
    same = make(ONE.model_copy(update={"embedding_std": 0.0}))
    thetas = same.generate(["d", "b"])
    assert torch.equal(thetas["d"], thetas["b"][:57])
    assert (thetas["b"][:10] - thetas["b"][10:20]).abs().max() > 0.01


def test_state_comes_back_and_another_layout_is_refused() -> None:
    saved, again = make(), Hypernetwork(ONE, seed=0)
    again.load_state_dict(*saved.state_dict())
    assert torch.equal(again.generate(["d"])["d"], saved.generate(["d"])["d"])
    other = Hypernetwork(ONE.model_copy(update={"head_layout": "separate"}), seed=0)
    with pytest.raises(CheckpointError, match="head-layout = one; this run has separate"):
        other.load_state_dict(*saved.state_dict())


def test_a_step_descends_and_least_squares_is_refused() -> None:
    hypernet = make()
    before = hypernet.generate(["d"])["d"].clone()
    update = ServerUpdate(hypernet, UpdateSection(server_lr=0.01), total_rounds=1)
    update.step([ClientUpdate("d", torch.ones(57))], progress=0.0)
    assert (before - hypernet.generate(["d"])["d"]).mean() > 0
    least_squares = {"server-rule": "least-squares", "embedding-std": 1.0}
    with pytest.raises(ConfigError, match="Set head-layout = 'separate'"):
        RunConfig.parse({"head-layout": "one", **least_squares})


@pytest.mark.parametrize("layout", ["separate", "one"])
def test_bfloat16_products_are_within_its_rounding(layout: str) -> None:
    exact = make(ONE.model_copy(update={"head_layout": layout})).generate(list(SIZES))
    short = ONE.model_copy(update={"head_layout": layout, "generation_precision": "bfloat16"})
    for client_id, theta in make(short).generate(list(SIZES)).items():
        assert theta.dtype == torch.float32
        assert not torch.equal(theta, exact[client_id])
        torch.testing.assert_close(theta, exact[client_id], rtol=2**-6, atol=2**-6)


def test_large_blocks_are_ordinary_tensors() -> None:
    block = fresh(2, HUGE_BYTES // 4, device=torch.device("cpu"))
    assert block.shape == (2, HUGE_BYTES // 4)
    assert block.dtype == torch.float32
    row = block.fill_(3.0)[1]
    del block
    assert float(row.sum()) == 3.0 * (HUGE_BYTES // 4)
