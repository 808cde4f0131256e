"""Models: the published parameter counts, user models, seeded dropout."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from client_app.models.building import num_parameters
from client_app.models.instances import GeneratorDropout, seed_dropout
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


# dropout


def _seeded(name: str, seed: int) -> nn.Module:
    model = build_model(name, in_channels=3, num_classes=10)
    seed_dropout(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("name", ["vgg8", "squeezenet1_1"])
def test_dropout_depends_on_its_generator_alone(name: str) -> None:
    first, again, other = _seeded(name, 1), _seeded(name, 1), _seeded(name, 2)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    images = torch.randn(8, 3, 32, 32)
    before = torch.random.get_rng_state()
    result = first(images)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)  # a foreign draw changes nothing
    assert torch.equal(again(images), result)
    assert not torch.equal(other(images), result)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Dropout(0.25))
    seed_dropout(model, torch.Generator().manual_seed(0))
    x = torch.ones(100, 100)
    dropped = model(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(model.eval()(x), x)


def test_dropout2d_drops_whole_channels_and_p1_drops_all() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5))
    seed_dropout(model, torch.Generator().manual_seed(0))
    dropped = model(torch.ones(4, 6, 3, 3)).flatten(2)
    assert torch.equal(dropped.amin(2), dropped.amax(2))
    everything = nn.Sequential(nn.Dropout(1.0))
    seed_dropout(everything, torch.Generator())
    assert everything(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_seeding_again_hands_over_and_keeps_names_and_mode() -> None:
    model = build_model("vgg8", in_channels=3, num_classes=10).eval()
    keys = list(model.state_dict())
    seed_dropout(model, torch.Generator().manual_seed(1))
    second = torch.Generator().manual_seed(2)
    seed_dropout(model, second)
    seeded = [m for m in model.modules() if isinstance(m, GeneratorDropout)]
    assert len(seeded) == 2
    assert all(m.generator is second and not m.training for m in seeded)
    assert list(model.state_dict()) == keys


def test_dropout_that_cannot_be_seeded() -> None:
    with pytest.raises(ModelError, match=r"AlphaDropout draws from torch's global generator"):
        seed_dropout(nn.Sequential(nn.AlphaDropout(0.5)), torch.Generator())


def test_dropout_inside_attention_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        seed_dropout(nn.MultiheadAttention(8, 2, dropout=0.1), torch.Generator())
    assert "MultiheadAttention) applies dropout 0.1 inside" in caplog.text
