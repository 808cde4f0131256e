"""Part (f): clients of one architecture trained by one batched call, against one by one.

`client_app.training.batched` is the in-process engine's `batched-clients`. It is made for GPUs,
where a step
of one small model leaves most of the chip idle; on a CPU the grouped kernels are the slower ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from client_app.models.registry import build_model
from client_app.training.batched import Member, train_cohort
from client_app.training.loop import train
from common.config import TrainingSection
from common.parameters import FlatModel
from experiments.benchmarks.client import random_client
from experiments.benchmarks.synthetic import NUM_CLASSES
from experiments.benchmarks.timing import take_turns

BATCH = 64


def batched_training(
    name: str, repeats: int, *, num_clients: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time one local epoch of `num_clients` clients, `steps` batches of 64 each, both ways.

    Returns
    -------
    Seconds of both, their ratio, and `difference`: the largest distance between a client's two
    results, as a fraction of how far its training went.
    """
    data = random_client(BATCH * steps, BATCH, device)
    module = build_model(name, in_channels=3, num_classes=NUM_CLASSES).to(device)
    model, section = FlatModel(module), TrainingSection(batch_size=BATCH)
    start = model.theta.detach().clone()
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
    alone: list[Tensor] = []
    together: list[Tensor] = []

    def one_by_one() -> None:
        alone.clear()
        for client in range(num_clients):
            model.load(start)
            for key, buffer in module.named_buffers():
                buffer.copy_(buffers[key])
            train(model, data, section, generator=torch.Generator().manual_seed(client))
            alone.append(model.theta.detach().clone())

    def batched() -> None:
        members = [
            Member(start, buffers, data, torch.Generator().manual_seed(client))
            for client in range(num_clients)
        ]
        together[:] = [outcome.theta for outcome in train_cohort(module, members, section)]

    found = take_turns({"one_by_one": one_by_one, "batched": batched}, repeats)
    apart = [
        float((one - other).norm() / (one - start).norm())
        for one, other in zip(alone, together, strict=True)
    ]
    return {
        "num_clients": num_clients,
        "steps": steps,
        "one_by_one_seconds": found["one_by_one"].best,
        "batched_seconds": found["batched"].best,
        "ratio": found["one_by_one"].best / found["batched"].best,
        "difference": max(apart),
    }
