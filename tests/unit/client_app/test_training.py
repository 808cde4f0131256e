"""Local training against torch's own, and against a clear reference; what it costs a process."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client_app.models.cnn import CNN
from client_app.models.registry import build_model
from client_app.models.vgg import VGG8
from client_app.participant import rate_of_round
from client_app.training.allocator import keep_freed_memory
from client_app.training.loop import (
    FlatModel,
    evaluate,
    label_loss,
    make_optimizer,
    train,
)
from common.config import TrainingSection
from tests.reference.algorithm import Hyper, load_theta, local_training, read_theta
from tests.unit.client_app.pictures import client_data, draw_theta

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("name", ["cnn", "resnet10"])
def test_local_training_equals_the_reference(name: str) -> None:
    section = TrainingSection(batch_size=32, learning_rate=5e-3, weight_decay=5e-4)
    data = client_data()
    model = FlatModel(build_model(name, in_channels=3, num_classes=10))
    clear = build_model(name, in_channels=3, num_classes=10)
    theta = draw_theta(clear)
    model.load(theta)
    load_theta(clear, theta)
    train(model, data, section, generator=torch.Generator().manual_seed(5))
    batches = list(data.batches(32, torch.Generator().manual_seed(5)))
    local_training(clear, batches, hyper=Hyper(), clip=section.client_clip_norm)
    torch.testing.assert_close(model.theta.detach(), read_theta(clear), rtol=0, atol=1e-5)
    for mine, theirs in zip(model.module.buffers(), clear.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizers_descend_as_torchs_do(optimizer: str) -> None:
    section = TrainingSection.model_validate(
        {"optimizer": optimizer, "learning-rate": 0.1, "momentum": 0.8, "weight-decay": 0.01}
    )
    ours = torch.randn(50, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    descent = make_optimizer(ours, section)
    if optimizer == "sgd":
        torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.8, weight_decay=0.01)
    else:
        torchs = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    start = ours.detach().clone()
    for step in range(20):
        for theta in (ours, theirs):
            theta.grad = (theta.detach() - 1.0) * (1 + step % 3)
        descent.step(ours.grad)
        torchs.step()
    assert not torch.allclose(ours, start, atol=0.1)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stack_descends_as_each_by_itself(optimizer: str) -> None:
    """The second of two models takes every other step."""
    section = TrainingSection.model_validate({"optimizer": optimizer, "learning-rate": 0.01})
    generator = torch.Generator().manual_seed(2)
    stack = torch.randn(2, 30, generator=generator)
    alone = [theta.clone() for theta in stack]
    together = make_optimizer(stack, section)
    own = [make_optimizer(theta, section) for theta in alone]
    for step in range(6):
        gradients = torch.randn(2, 30, generator=generator)
        active = 1 + step % 2
        together.step(gradients[:active], slice(0, active))
        for one, gradient in zip(own[:active], gradients[:active], strict=True):
            one.step(gradient)
    torch.testing.assert_close(stack, torch.stack(alone))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    labels, section = torch.tensor([0, 3, 1, 1, 2]), TrainingSection(label_smoothing=smoothing)
    found = label_loss(logits, labels, section)
    assert torch.equal(found, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))
    each = label_loss(logits, labels, section, reduction="none")
    torch.testing.assert_close(each.mean(), found)


def test_the_rate_falls_along_a_cosine() -> None:
    section = TrainingSection(learning_rate=0.02, learning_rate_final=0.1)
    rates = [rate_of_round(section, now, rounds=5) for now in range(1, 6)]
    assert rates == pytest.approx([0.02, 0.0173640, 0.011, 0.0046360, 0.002], rel=1e-4)
    assert rate_of_round(section, 9, rounds=5) == pytest.approx(0.002)
    assert rate_of_round(section, 1, rounds=1) == pytest.approx(0.02)
    constant = TrainingSection(learning_rate=0.03)
    assert {rate_of_round(constant, now, rounds=7) for now in range(1, 8)} == {0.03}


def relu_first_cnn(model: CNN, images: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(model.conv1(images)), 2)
    x = F.max_pool2d(F.relu(model.conv2(x)), 2)
    return model.head(F.relu(model.fc2(F.relu(model.fc1(x.flatten(1))))))


def relu_first_vgg(model: VGG8, images: Tensor) -> Tensor:
    x = images
    for index, conv in enumerate(model.convs):
        x = F.relu(conv(x))
        x = F.max_pool2d(x, 2) if index % 2 == 1 else x
    return model.head(F.relu(model.fc2(F.relu(model.fc1(x.flatten(1))))))


@pytest.mark.parametrize(("name", "published"), [("cnn", relu_first_cnn), ("vgg8", relu_first_vgg)])
def test_pooling_before_relu_changes_no_bit(
    name: str, published: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    model = build_model(name, in_channels=3, num_classes=10).eval()  # no dropout in the way
    images, labels = next(client_data().batches(16, torch.Generator().manual_seed(0)))
    images[0] = -3.0  # whole windows below zero, and ties
    results = []
    for forward in (model, lambda x: published(model, x)):
        logits = forward(images)
        loss = F.cross_entropy(logits, labels)
        results.append((logits, *torch.autograd.grad(loss, list(model.parameters()))))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


class Forgetful(nn.Module):
    """Two layers, one of which the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_backward_overwrites_the_flat_gradient() -> None:
    model = FlatModel(Forgetful())
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model.module(x).square().sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.module.parameters()]
    expected = torch.cat([gradient.flatten() for gradient in found])
    model.theta.grad.fill_(7.0)
    model.backward(model.module(x).square().sum())
    assert torch.equal(model.theta.grad, expected)
    assert expected[-6:].tolist() == [0.0] * 6


def test_evaluation_does_not_depend_on_the_size_of_its_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = FlatModel(build_model("cnn", in_channels=3, num_classes=10)), client_data()
    found = []
    for size in (64, 7):
        monkeypatch.setattr("client_app.training.loop.TEST_BATCH", {"cpu": size})
        found.append(evaluate(model, data))
    assert found[0].num_correct == found[1].num_correct
    assert found[0].test_loss == pytest.approx(found[1].test_loss, rel=1e-6)


@pytest.mark.parametrize("name", ["cnn", "resnet10", "vit"])
def test_mixed_precision_goes_where_float32_goes(name: str) -> None:
    """Products of bfloat16 have 8 bits; the change of an epoch agrees to a fifth of its length."""
    changes = []
    for precision in ("float32", "bfloat16"):
        model = FlatModel(build_model(name, in_channels=3, num_classes=10))
        start = draw_theta(model.module)
        model.load(start)
        section = TrainingSection(batch_size=16, training_precision=precision)
        trained = train(model, client_data(), section, generator=torch.Generator().manual_seed(1))
        assert model.theta.dtype == torch.float32
        changes.append((start - model.theta.detach(), trained.loss))
    (exact, exact_loss), (mixed, mixed_loss) = changes
    assert not torch.equal(exact, mixed)
    assert (exact - mixed).norm() < 0.2 * exact.norm()
    assert mixed_loss == pytest.approx(exact_loss, rel=0.01)


# in a process of its own: a message's

IN_A_PROCESS = """
import sys, torch
from client_app.training.loop import evaluate
from client_app.training.loop import train
from client_app.models.building import ModelKind
from client_app.models.instances import instance_of
from client_app.participant import rate_of_round
from common.config import TrainingSection
from tests.unit.client_app.pictures import client_data

torch.set_num_threads(1)
instance = instance_of(ModelKind("cnn", 3, 10, torch.device("cpu")))
data, generator = client_data(num_train=640), torch.Generator().manual_seed(0)

def epochs(count):
    for _ in range(count):
        train(instance.model, data, TrainingSection(), generator=generator)
"""


def run_in_a_process(code: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS + code], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_training_does_not_import_torchs_compiler() -> None:
    """It costs seconds, and a client without a warm worker would pay them for every message."""
    found = "[name for name in sys.modules if name.startswith(('torch._dynamo', 'sympy'))]"
    code = f"epochs(1); evaluate(instance.model, data); print({found})"
    assert run_in_a_process(code) == "[]"


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_an_epoch_asks_the_system_for_no_memory() -> None:
    """Without `keep_freed_memory` five take 65,000 pages and more; 77,456 measured."""
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    code = f"import resource; epochs(3); before = {faults}; epochs(5); print({faults} - before)"
    assert int(run_in_a_process(code)) < 5 * 500
