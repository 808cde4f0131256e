"""The optimiser of local training, against torch's own."""

from __future__ import annotations

import subprocess
import sys

import torch

from client_app.training.loop import MomentumSGD
from common.config import TrainingSection

ROUND_TRIP = """
import sys, torch
from client_app.data.examples import ClientData
from client_app.training.loop import evaluate, train
from client_app.workshop import ModelKind, borrow
from common.config import TrainingSection
from tests.unit.client_app.test_training_speed import pictures

tool = borrow(ModelKind("cnn", 3, 10, torch.device("cpu")))
data = pictures()
train(tool.model, data, TrainingSection(), generator=torch.Generator().manual_seed(0))
evaluate(tool.model, data)
print(sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "sympy"))))
"""


def test_it_descends_as_torch_does() -> None:
    section = TrainingSection.model_validate(
        {"learning-rate": 0.1, "momentum": 0.8, "weight-decay": 0.01}
    )
    ours = torch.randn(50, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    descent = MomentumSGD(ours, section)
    torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.8, weight_decay=0.01)
    start = ours.detach().clone()
    for step in range(20):
        for theta in (ours, theirs):
            theta.grad = (theta.detach() - 1.0) * (1 + step % 3)
        descent.step()
        torchs.step()
    assert not torch.allclose(ours, start, atol=0.1)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_does_not_import_torchs_compiler() -> None:
    """It costs seconds, and a client without a warm worker would pay them for every message."""
    found = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
