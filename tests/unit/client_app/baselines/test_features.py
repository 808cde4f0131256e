"""Where a model's head is, what its features are, and what a model without a head is told."""

import pytest
import torch
from torch import Tensor, nn

from client_app.data.examples import ClientData
from client_app.methods.features import class_means, head_of, require_head_is_last, tapped
from client_app.methods.pfedhn import BatchBudget
from client_app.models.building import ModelKind, architecture_tag, draw_theta
from client_app.models.instances import FlatModel, Instance, instance_of
from client_app.models.registry import MODEL_NAMES, build_model
from common.errors import ModelError
from tests.support.tiny import Small

pytestmark = pytest.mark.numeric

WITHOUT_HEAD = ("squeezenet1_0", "squeezenet1_1")


def toy_data(count: int = 70) -> ClientData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)  # of 4 classes, one is missing
    return ClientData(
        train_images=images,
        train_labels=labels,
        test_images=images[:9],
        test_labels=labels[:9],
        validation_images=images[:0],
        validation_labels=labels[:0],
        mean=torch.tensor([0.5]),
        std=torch.tensor([0.25]),
        num_classes=4,
        in_channels=1,
    )


INPUTS = {
    "perceptron": torch.zeros(2, 1),
    "conv1d": torch.zeros(2, 1, 20),
    "conv3d": torch.zeros(2, 1, 8, 8, 8),
    "tokens": torch.ones(2, 12, dtype=torch.int64),
}


@pytest.mark.parametrize("name", [n for n in MODEL_NAMES if n not in WITHOUT_HEAD])
def test_every_family_has_a_head_of_64_features_at_the_end_of_theta(name: str) -> None:
    model = build_model(name, in_channels=1, num_classes=10)
    inputs = INPUTS.get(name, torch.zeros(2, 1, 32, 32))
    head = require_head_is_last(model, inputs, 10)
    assert head.layer is model.head
    assert head.layer.in_features == 64
    flat = FlatModel(model)
    expected = torch.cat([model.head.weight.reshape(-1), model.head.bias])
    assert torch.equal(flat.theta[head.span], expected)


@pytest.mark.parametrize("name", WITHOUT_HEAD)
def test_squeezenet_is_told_what_else_it_can_do(name: str) -> None:
    with pytest.raises(ModelError, match=r"SqueezeNet has no head: .* local, fd, fml and mh-pfed"):
        head_of(build_model(name, in_channels=1, num_classes=10), 10)


def test_a_model_that_goes_on_after_its_linear_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LogSoftmax(dim=1))
    with pytest.raises(ModelError, match=r"Sequential does not end in its Linear\(D, 4\)"):
        require_head_is_last(model, torch.zeros(2, 1, 8, 8), 4)


def test_a_head_that_stands_first_in_theta_is_found_there() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 4)
            self.body = nn.Linear(64, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.body(images.flatten(1)))

    assert require_head_is_last(Reversed(), torch.zeros(2, 1, 8, 8), 4).span == slice(0, 24)


def test_tap_gives_features_with_their_graph_and_lets_go() -> None:
    model = Small(8, 4)
    head = head_of(model, 4)
    with tapped(head) as tap:
        logits = model(torch.rand(3, 1, 8, 8))
        assert torch.equal(head.layer(tap.features), logits)
        tap.features.sum().backward()
    assert model.hidden.weight.grad is not None
    before = tap.features
    model(torch.rand(2, 1, 8, 8))
    assert tap.features is before


def test_class_means_of_features_and_of_logits() -> None:
    data, model = toy_data(), Small(8, 4)
    images = data.normalise(data.train_images)
    pooled = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
    features = torch.relu(model.hidden(pooled)).detach()
    for vectors, head in ((features, head_of(model, 4)), (model.head(features).detach(), None)):
        found = class_means(model, data, head)
        assert found.counts.tolist() == torch.bincount(data.train_labels, minlength=4).tolist()
        for c in range(3):
            expected = vectors[data.train_labels == c].mean(dim=0)
            torch.testing.assert_close(torch.from_numpy(found.means[c]), expected)
        assert not found.means[3].any()


@pytest.mark.parametrize("count", [1, 3, 11])
def test_batch_budget_gives_exactly_so_many_batches(count: int) -> None:
    budget = BatchBudget(toy_data(), count)
    sizes = [len(y) for _, y in budget.batches(32, torch.Generator().manual_seed(0))]
    assert sizes == ([32, 32, 6] * 4)[:count]


def test_first_weights_are_everybodys_and_leave_torchs_generator_alone() -> None:
    kind = ModelKind("cnn", 1, 10, torch.device("cpu"))
    before = torch.get_rng_state()
    first, again, other = draw_theta(kind, 5), draw_theta(kind, 5), draw_theta(kind, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() > 0.01


def test_tag_tells_architectures_apart_and_nothing_else() -> None:
    def instance(name: str) -> Instance:
        return instance_of(ModelKind(name, 1, 10, torch.device("cpu")))

    tags = {name: architecture_tag(instance(name).model.module) for name in ("cnn", "mlp", "vgg8")}
    assert len(set(tags.values())) == 3
    assert all(len(tag) == 16 and int(tag, 16) >= 0 for tag in tags.values())
    instance("cnn").model.load(torch.zeros_like(instance("cnn").model.theta))
    assert architecture_tag(instance("cnn").model.module) == tags["cnn"]
