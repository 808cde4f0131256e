"""Models: the published parameter counts, user models, seeded dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client_app.models.building import num_parameters
from client_app.models.registry import MODEL_NAMES, build_model, model_for_partition
from common.errors import ConfigError, ModelError

# method.md, "Parameter counts that the model zoo must reproduce"
PUBLISHED = {
    (3, 10): {
        "cnn": 234_006, "vgg8": 268_814, "resnet10": 347_178, "resnet12": 523_242,
        "resnet18": 565_386, "vit": 307_914,
    },
    (3, 100): {
        "cnn": 239_856, "vgg8": 274_664, "resnet10": 353_028, "resnet12": 529_092,
        "resnet18": 571_236, "mlp": 408_100, "squeezenet1_1": 773_796, "squeezenet1_0": 786_724,
    },
    (3, 200): {
        "cnn": 246_356, "vgg8": 281_164, "resnet10": 359_528, "resnet12": 535_592,
        "resnet18": 577_736,
    },
    (1, 62): {
        "cnn": 237_098, "vgg8": 271_906, "resnet10": 350_270, "resnet12": 526_334,
        "resnet18": 568_478,
    },
}  # fmt: skip
CASES = [
    (name, channels, classes, count)
    for (channels, classes), row in PUBLISHED.items()
    for name, count in row.items()
]


@pytest.mark.parametrize(("name", "channels", "classes", "count"), CASES)
def test_parameter_count_is_the_published_one(
    name: str, channels: int, classes: int, count: int
) -> None:
    model = build_model(name, in_channels=channels, num_classes=classes)
    assert num_parameters(model) == count


OF_PICTURES = [n for n in MODEL_NAMES if n not in ("perceptron", "conv1d", "conv3d", "tokens")]


@pytest.mark.parametrize("name", OF_PICTURES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_model_maps_images_to_logits_and_gives_every_parameter_a_gradient(
    name: str, channels: int
) -> None:
    model = build_model(name, in_channels=channels, num_classes=7)
    images = torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)  # as in training
    logits = model(images)
    assert logits.shape == (4, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_squeezenets_are_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision.models")
    for name in ("squeezenet1_0", "squeezenet1_1"):
        theirs = getattr(torchvision, name)(num_classes=10).eval()
        ours = build_model(name, in_channels=3, num_classes=10).eval()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(ours(images), theirs(images))


def test_wrong_image_size_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"cnn takes 32x32 images, got 28x28\. Set image-size"):
        build_model("cnn", in_channels=1, num_classes=10)(torch.zeros(1, 1, 28, 28))


# a participant's own model

OWN = """
import torch
from torch import nn

def good(in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 1024, num_classes))

def positional(): return nn.Linear(1, 1)
def raises(in_channels, num_classes): raise RuntimeError("no licence")
def number(in_channels, num_classes): return 3
def empty(in_channels, num_classes): return nn.Flatten()
def lazy(in_channels, num_classes): return nn.LazyLinear(num_classes)
def double(in_channels, num_classes): return nn.Linear(4, num_classes).double()
def frozen(in_channels, num_classes): return nn.Linear(4, num_classes).requires_grad_(False)
constant = 4
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models_for_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_models_for_test"


def test_own_model_is_built(own_module: str) -> None:
    model = build_model(f"{own_module}:good", in_channels=1, num_classes=3)
    assert num_parameters(model) == 1024 * 3 + 3


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("positional", "must accept the keywords in_channels and num_classes"),
        ("raises", "raised RuntimeError for in_channels=1, num_classes=3: no licence"),
        ("number", "returned a int, not torch.nn.Module"),
        ("empty", "has no trainable parameters: nothing can be generated"),
        ("lazy", "weight is lazy and has no shape yet"),
        ("double", "weight is torch.float64, expected float32"),
        ("frozen", "has no trainable parameters: nothing can be generated"),
        ("constant", "has a int, not a callable, under 'constant'"),
        ("nothing", "has nothing under 'nothing'"),
        ("not a name", "must be 'module:attribute', for instance 'my_models:small_net'"),
    ],
)
def test_bad_own_model_explains(own_module: str, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(f"{own_module}:{factory}", in_channels=1, num_classes=3)


def test_own_model_that_cannot_be_imported() -> None:
    with pytest.raises(ModelError, match=r"cannot import 'no_such_module_here'.*PYTHONPATH"):
        build_model("no_such_module_here:net", in_channels=1, num_classes=3)


# blocks of clients

FIVE = ["cnn", "vgg8", "resnet10", "resnet12", "resnet18"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (", ".join(FIVE), [name for name in FIVE for _ in "ab"]),
        ("cnn,mlp", ["cnn"] * 3 + ["mlp"] * 2),  # uneven blocks differ by one client
    ],
)
def test_models_go_to_contiguous_blocks(names: str, chosen: list[str]) -> None:
    clients = len(chosen)
    assert [model_for_partition(names, i, clients) for i in range(clients)] == chosen
    assert model_for_partition("mlp", -1, 0) == "mlp"  # one model needs no partition


@pytest.mark.parametrize(
    ("models", "partition_id", "message"),
    [
        ("cnn,mpl", 0, "unknown model 'mpl'. Did you mean 'mlp'"),
        ("cnn,,mlp", 0, "has an empty name"),
        ("cnn,mlp", -1, r"partition-id = -1 is not in 0\.\.9.*names one model in its node config"),
        ("cnn,mlp", 10, r"partition-id = 10 is not in 0\.\.9"),
    ],
)
def test_bad_models_explain(models: str, partition_id: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_for_partition(models, partition_id, 10)
