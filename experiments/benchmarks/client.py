"""Part (b): one local step of a client, this project's data path against a DataLoader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from client_app.data.examples import ClientData
from client_app.models.registry import build_model
from client_app.training.loop import evaluate, train
from common.config import TrainingSection
from common.parameters import FlatModel
from experiments.benchmarks.clear import moved, reference, train_loader
from experiments.benchmarks.machine import Machine
from experiments.benchmarks.synthetic import NUM_CLASSES
from experiments.benchmarks.timing import take_turns


def random_client(num_train: int, num_test: int, device: torch.device | str = "cpu") -> ClientData:
    """Make a client with random pictures of CIFAR-100's shape."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        drawn = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return drawn.contiguous(memory_format=torch.channels_last).to(device)

    def labels(count: int) -> Tensor:
        return torch.randint(NUM_CLASSES, (count,), generator=generator).to(device)

    return ClientData(
        train_images=images(num_train),
        train_labels=labels(num_train),
        test_images=images(num_test),
        test_labels=labels(num_test),
        mean=torch.full((3,), 0.5, device=device),
        std=torch.full((3,), 0.25, device=device),
        num_classes=NUM_CLASSES,
        in_channels=3,
    )


def client_step(
    name: str, machine: Machine, repeats: int, *, device: torch.device, steps: int = 4
) -> dict[str, Any]:
    """Time one step of a model at batch 64 (seconds a step), with the plain script beside it."""
    batch, section = 64, TrainingSection()
    data = random_client(batch * steps, batch, device)
    model = FlatModel(build_model(name, in_channels=3, num_classes=NUM_CLASSES).to(device))
    plain = build_model(name, in_channels=3, num_classes=NUM_CLASSES).to(device)
    loader, algorithm = train_loader(data, batch), reference()
    shuffle = torch.Generator().manual_seed(0)

    def script() -> None:
        algorithm.local_training(plain, moved(loader, device), hyper=algorithm.Hyper(), clip=50.0)

    found = take_turns(
        {
            "step": lambda: train(model, data, section, generator=shuffle),
            "dataloader_step": script,
            "batches": lambda: [None for _ in data.batches(batch, shuffle)],
            "dataloader_batches": lambda: [None for _ in loader],
            "test_batch": lambda: [evaluate(model, data) for _ in range(steps)],
        },
        repeats,
    )
    result: dict[str, Any] = {
        f"{key}_seconds": timing.best / steps for key, timing in found.items()
    }
    result["ratio"] = result["dataloader_step_seconds"] / result["step_seconds"]
    if device.type == "cpu":
        result["bounds"] = machine.bound(result["step_seconds"], flops=step_flops(name, batch))
    return result


def step_flops(name: str, batch: int) -> float:
    """Count the operations of forward and backward of one batch."""
    model = build_model(name, in_channels=3, num_classes=NUM_CLASSES)
    images = torch.zeros(batch, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return float(counter.get_total_flops())


def forward_flops(name: str, batch: int) -> float:
    """Count the operations of a forward pass of one batch."""
    model = build_model(name, in_channels=3, num_classes=NUM_CLASSES).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(batch, 3, 32, 32))
    return float(counter.get_total_flops())
