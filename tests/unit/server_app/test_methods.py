"""The arithmetic of the methods' servers against slow, clear references."""

import numpy as np
import pytest
import torch
from torch import nn

from common.class_means import ClassMeans
from common.errors import ConfigError, RegistrationError, WireError
from common.messages import Registration
from common.records import Content, Header, Received, encode
from common.seeding import torch_generator
from server_app.methods.base import Upload
from server_app.methods.heads import FedGH
from server_app.methods.pfedhn import PFedHN
from server_app.methods.prototypes import FedProto, FedTGP, adaptive_margin, contrast, generated
from tests.unit.server_app.servers import adapted, client, learn, make, means, open_round


def reply(**arrays: np.ndarray) -> Received:
    return Received(encode(Header("fed", "m", 1, "n"), Content(arrays=arrays)))


# --- FedAvg --------------------------------------------------------------------------------------


def test_fedavg_averages_inside_each_group_and_nowhere_else() -> None:
    server = make("fedavg")
    a, b, other = client("a"), client("b"), client("c", group="bb")
    smaller = client("d", num_parameters=2)  # same tag, other size: never mixed
    assert server.download(a) == {}
    uploads = [
        Upload(a, 30, np.full(6, 1, np.float32)),
        Upload(b, 10, np.full(6, 5, np.float32)),
        Upload(other, 10, np.full(6, 7, np.float32)),
        Upload(smaller, 10, np.full(2, 9, np.float32)),
    ]
    learn(server, uploads, 1)
    assert server.download(a)["theta"].tolist() == [2.0] * 6
    assert server.download(b)["theta"].tolist() == [2.0] * 6
    assert server.download(other)["theta"].tolist() == [7.0] * 6
    assert server.download(smaller)["theta"].tolist() == [9.0] * 2
    learn(server, uploads[1:2], 2)  # a did not answer
    assert server.download(a)["theta"].tolist() == [5.0] * 6
    assert server.download(other)["theta"].tolist() == [7.0] * 6


def test_fedavg_limits_the_change_of_a_model_not_its_norm() -> None:
    server = make("fedavg")
    far = np.full(6, 1e3, np.float32)
    with pytest.raises(WireError, match=r"theta has norm 2.45e\+03; at most 100 is accepted"):
        server.read(client("a"), reply(theta=far))
    learn(server, [Upload(client("a"), 1, far)], 1)
    assert server.read(client("a"), reply(theta=far + 1)).tolist() == [1001.0] * 6


# --- heads and prototypes ------------------------------------------------------------------------


def test_lg_fedavg_averages_heads_by_examples() -> None:
    server = make("lg-fedavg")
    first = server.download(client("a"))["head"]
    assert first.shape == (4 * 3 + 4,)
    assert np.abs(first).max() <= 3**-0.5
    up = [Upload(client(c), n, first + d) for c, n, d in (("a", 1, 1.0), ("b", 3, 2.0))]
    learn(server, up, 1)
    np.testing.assert_allclose(server.download(client("b"))["head"], first + 1.75, atol=1e-6)


def test_fedproto_weights_by_counts_and_keeps_classes_that_did_not_come() -> None:
    server: FedProto = make("fedproto")
    one = ClassMeans(np.array([3, 0, 2, 0]), np.float32([[1, 1, 1], [0, 0, 0], [5, 5, 5], [0] * 3]))
    two = ClassMeans(np.array([1, 0, 0, 0]), np.float32([[5, 5, 5], [0] * 3, [0] * 3, [0] * 3]))
    learn(server, [Upload(client("a"), 5, one), Upload(client("b"), 1, two)], 1)
    learn(server, [Upload(client("b"), 1, two)], 2)
    sent = server.download(client("a"))
    assert sent["counts"].tolist() == [1, 0, 1, 0]  # who is there, not how many
    assert sent["means"].tolist() == [5, 5, 5, 5, 5, 5]
    assert server.prototypes.means[0].tolist() == [5, 5, 5]


def test_fedgh_trains_the_head_as_torch_would() -> None:
    server: FedGH = make("fedgh", batch_size=2, baseline_server_lr=0.1)
    rng = np.random.default_rng(3)
    uploads = [
        Upload(client("a"), 5, means(rng, [0, 2])),
        Upload(client("b"), 5, means(rng, [1, 2, 3])),
    ]
    head = server.download(client("a"))["head"]
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head[:12]).view(4, 3))
        layer.bias.copy_(torch.from_numpy(head[12:]))
    features = torch.from_numpy(
        np.concatenate([uploads[0].content.means[[0, 2]], uploads[1].content.means[1:]])
    )
    labels = torch.tensor([0, 2, 1, 2, 3])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    generator = torch_generator(42, "fedgh", server_round=9)
    for rows in torch.randperm(5, generator=generator).split(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(features[rows]), labels[rows]).backward()
        optimizer.step()
    learn(server, uploads, 9)
    expected = torch.cat([layer.weight.reshape(-1), layer.bias]).detach().numpy()
    np.testing.assert_allclose(server.download(client("a"))["head"], expected, atol=1e-6)
    assert np.abs(expected - head).max() > 0.01


def test_fedtgp_margin_is_the_largest_distance_up_to_the_threshold() -> None:
    pooled = ClassMeans(np.array([1, 0, 2]), np.float32([[0, 0], [99, 99], [3, 4]]))
    assert adaptive_margin(pooled, 100.0) == pytest.approx(5.0)
    assert adaptive_margin(pooled, 2.0) == 2.0


def test_fedtgp_loss_is_the_papers_equation() -> None:
    rng = np.random.default_rng(5)
    features, prototypes = (torch.from_numpy(rng.normal(size=(n, 3))) for n in (5, 4))
    labels, margin = torch.tensor([0, 1, 1, 3, 2]), 0.7
    total = 0.0
    for x, y in zip(features, labels, strict=True):
        d = [float((x - p).square().sum()) ** 0.5 for p in prototypes]
        top = np.exp(-(d[y] + margin))
        total -= np.log(top / (top + sum(np.exp(-d[c]) for c in range(4) if c != y)))
    assert float(contrast(features, labels, prototypes, margin)) == pytest.approx(total / 5)


def test_fedtgp_learns_prototypes_nearest_to_their_own_class() -> None:
    server: FedTGP = make("fedtgp", baseline_server_lr=0.05)
    rng = np.random.default_rng(6)
    centres = 2 * rng.normal(size=(4, 16))
    uploads = []
    for name in "abc":
        seen = (centres + 0.1 * rng.normal(size=(4, 16))).astype(np.float32)
        uploads.append(Upload(client(name), 9, ClassMeans.of(seen, np.arange(4), 4)))
    learn(server, uploads, 1)
    prototypes = server.prototypes.means
    distances = np.linalg.norm(centres[:, None] - prototypes[None], axis=2)
    assert distances.argmin(axis=1).tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(prototypes, generated(server.learned).numpy())


# --- pFedHN --------------------------------------------------------------------------------------


class PerLayerHeads(nn.Module):
    """pFedHN as its paper has it: an MLP and one Linear for each tensor of the target model."""

    def __init__(self, server: PFedHN, sizes: list[int]) -> None:
        super().__init__()
        layers = [m for m in server._net if isinstance(m, nn.Linear)]
        self.mlp = nn.ModuleList(nn.Linear(x.in_features, x.out_features) for x in layers[:-1])
        self.heads = nn.ModuleList(nn.Linear(100, size) for size in sizes)
        for mine, theirs in zip(self.mlp, layers, strict=False):
            mine.load_state_dict(theirs.state_dict())
        weights, biases = (x.split(sizes) for x in (layers[-1].weight, layers[-1].bias))
        for head, weight, bias in zip(self.heads, weights, biases, strict=True):
            head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})

    def forward(self, embedding: torch.Tensor) -> list[torch.Tensor]:
        x = self.mlp[0](embedding)
        for layer in self.mlp[1:]:
            x = layer(torch.relu(x))
        return [head(x) for head in self.heads]


def test_pfedhn_is_the_hypernetwork_with_a_head_for_each_layer() -> None:
    server: PFedHN = make("pfedhn")
    clients = [client(c) for c in "abcdefgh"]
    open_round(server, clients)
    assert server._embeddings["a"].shape == (1 + 8 // 4,)
    reference = PerLayerHeads(server, [4, 2])
    embedding = nn.Parameter(server._embeddings["b"].detach().clone())
    parameters = [*reference.parameters(), embedding]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3)
    for step, scale in enumerate((1.0, 300.0)):  # the second is clipped
        theta = torch.cat(reference(embedding))
        np.testing.assert_allclose(
            server.download(clients[1])["theta"], theta.detach().numpy(), atol=1e-6
        )
        delta = torch.linspace(-1, 1, 6) * scale
        optimizer.zero_grad()
        (theta * delta).sum().backward()
        norm = nn.utils.clip_grad_norm_(parameters, 50.0)
        assert (float(norm) > 50) == (step == 1)
        optimizer.step()
        learn(server, [Upload(clients[1], 10, delta.numpy())], 1)
    theta = torch.cat(reference(embedding)).detach().numpy()
    np.testing.assert_allclose(server.download(clients[1])["theta"], theta, atol=1e-5)


def test_pfedhn_says_what_to_use_for_several_architectures() -> None:
    with pytest.raises(ConfigError, match=r"ONE architecture, but models = 'cnn,mlp'.*'mh-pfedhn'"):
        adapted("pfedhn", models="cnn,mlp")
    server: PFedHN = make("pfedhn")
    with pytest.raises(RegistrationError, match=r"client z has another \(7 parameters\) than .* a"):
        server.admit(Registration("z", 7, 10, group="aa"), client("a"))
