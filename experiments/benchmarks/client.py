"""Client: a local step against a plain DataLoader script, many clients batched, a reply encoded.

Batched training (`client_app.training.batched`) is made for GPUs, where a step of one small model
leaves most of the chip idle; on a CPU the grouped kernels are the slower ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from client_app.data.examples import ClientData
from client_app.models.instances import FlatModel
from client_app.models.registry import build_model
from client_app.training.batched import Member, train_cohort
from client_app.training.loop import evaluate, train
from common.compression import Precision
from common.config import TrainingSection
from common.messages import DELTA, TrainReply
from common.records import Content, Header, Received, encode, payload_bytes
from experiments.benchmarks.clear import BATCH, CLIP_NORM, moved, reference, train_loader
from experiments.benchmarks.measuring import Machine, Row, attempt, devices, take_turns
from experiments.benchmarks.synthetic import NUM_CLASSES

build = partial(build_model, in_channels=3, num_classes=NUM_CLASSES)


def client_part(names: tuple[str, ...], machine: Machine, repeats: int) -> Row:
    """Time a step of each model on every device; the figures of the CNN on the CPU come first."""
    rows = {
        f"{name}/{device}": attempt(client_step, name, device, machine, repeats)
        for device in devices()
        for name in names
    }
    return rows["cnn/cpu"] | {"rows": rows}


def batched_part(num_clients: int, repeats: int, *, quick: bool) -> Row:
    """Time batched training of CNN clients on every device."""
    rows = {}
    for device in devices():
        # Two steps a client tell enough on a CPU; a GPU gets CIFAR-100's twelve.
        steps = 1 if quick else 12 if device == "cuda" else 2
        rows[f"cnn/{device}"] = attempt(batched_training, num_clients, steps, device, repeats)
    return {"rows": rows}


def random_client(num_train: int, num_test: int, device: str = "cpu") -> ClientData:
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
        validation_images=images(0),
        validation_labels=labels(0),
        mean=torch.full((3,), 0.5, device=device),
        std=torch.full((3,), 0.25, device=device),
        num_classes=NUM_CLASSES,
        in_channels=3,
    )


def client_step(name: str, device: str, machine: Machine, repeats: int, steps: int = 4) -> Row:
    """Time one step of a model at batch 64 (seconds a step), with the plain script beside it.

    On a GPU `graph_ratio` is how much slower it is where its kernels are launched one by one.
    """
    section, algorithm = TrainingSection(batch_size=BATCH), reference()
    data = random_client(BATCH * steps, BATCH, device)
    model, plain = FlatModel(build(name).to(device)), build(name).to(device)
    loader, shuffle = train_loader(data), torch.Generator().manual_seed(0)

    def script() -> None:
        batches = moved(loader, device)
        algorithm.local_training(plain, batches, hyper=algorithm.Hyper(), clip=CLIP_NORM)

    ways: dict[str, Callable[[], object]] = {
        "step": lambda: train(model, data, section, generator=shuffle),
        "dataloader_step": script,
        "batches": lambda: [None for _ in data.batches(BATCH, shuffle)],
        "dataloader_batches": lambda: [None for _ in loader],
        "test_batch": lambda: [evaluate(model, data) for _ in range(steps)],
    }
    if model.recorder:
        eager = FlatModel(build(name).to(device))
        eager.recorder = None
        ways["eager_step"] = lambda: train(eager, data, section, generator=shuffle)
    found = take_turns(ways, repeats)
    row: Row = {f"{key}_seconds": timing.best / steps for key, timing in found.items()}
    row["ratio"] = row["dataloader_step_seconds"] / row["step_seconds"]
    if model.recorder:
        row["graph_ratio"] = row["eager_step_seconds"] / row["step_seconds"]
    if device == "cpu":
        with FlopCounterMode(display=False) as counter:
            build(name)(torch.zeros(BATCH, 3, 32, 32)).sum().backward()
        row |= machine.bound(row["step_seconds"], flops=float(counter.get_total_flops()))
    return row


def batched_training(num_clients: int, steps: int, device: str, repeats: int) -> Row:
    """Time one local epoch of `num_clients` CNN clients, `steps` batches of 64 each, both ways.

    The row's `difference` is the largest distance between a client's two results, as a fraction of
    how far its training went.
    """
    data = random_client(BATCH * steps, BATCH, device)
    module = build("cnn").to(device)
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


def wire_part(num_parameters: int, machine: Machine, repeats: int) -> Row:
    """Measure every precision for a delta of `num_parameters` entries."""
    delta = np.random.default_rng(0).normal(0, 0.01, num_parameters).astype(np.float32)
    reply = Content(TrainReply(1, 0.0, 0.0).settings(), {DELTA: delta})
    rows: dict[str, Row] = {}
    for precision in get_args(Precision):
        encoding = partial(encode, Header("bench", "mh-pfedhn", 1, "nonce", precision), reply)
        content = encoding()
        decoding = partial(_decode, content, num_parameters)
        found = take_turns({"encode": encoding, "decode": decoding}, repeats)
        size, seconds = payload_bytes(content), found["encode"].best
        rows[precision] = {
            "bytes": size,
            "encode_seconds": seconds,
            "decode_seconds": found["decode"].best,
            **machine.bound(seconds, traffic=float(delta.nbytes + size)),
        }
    return {"rows": rows}


def _decode(content: RecordDict, num_parameters: int) -> None:
    received = Received(content)
    TrainReply.read(received, most=1)
    received.vector(DELTA, num_parameters)
