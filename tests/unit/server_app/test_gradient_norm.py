"""Shortcuts of the server step that must not change what it computes."""

import math

import pytest
import torch

from common.config import HypernetSection
from server_app.hypernet.network import Hypernetwork
from server_app.hypernet.pulls import Pull, global_norm

pytestmark = pytest.mark.numeric

TOY = HypernetSection(chunk_size=10, embed_dim=4, hidden_dim=8, embedding_std=0.5)


@pytest.mark.parametrize("size", [20, 57])
def test_the_norm_measured_on_the_way_is_the_norm_of_the_gradients(size: int) -> None:
    hypernet = Hypernetwork(TOY, seed=5)
    generator = torch.Generator().manual_seed(2)
    for client_id in "abc":
        hypernet.add_client(client_id, size)
    hypernet.add_client("d", 2 * size)
    deltas = {c: torch.randn(hypernet.num_parameters(c), generator=generator) for c in "abcd"}
    pullback = hypernet.backward([Pull(c, deltas[c], 0.25) for c in "abcd"])
    touched = [*pullback.shared, *pullback.embeddings]
    assert pullback.norm == pytest.approx(global_norm(touched), rel=1e-6)
    spoiled = [Pull(c, deltas[c] * math.nan if c == "b" else deltas[c], 0.25) for c in "abcd"]
    assert math.isnan(hypernet.backward(spoiled).norm)


def test_thetas_of_one_call_do_not_overlap() -> None:
    hypernet = Hypernetwork(TOY, seed=5)
    for client_id, size in {"a": 21, "b": 29, "c": 30}.items():
        hypernet.add_client(client_id, size)
    thetas = hypernet.generate("abc")
    kept = {c: theta.clone() for c, theta in thetas.items()}
    thetas["b"].fill_(9.0)
    assert torch.equal(thetas["a"], kept["a"])
    assert torch.equal(thetas["c"], kept["c"])
