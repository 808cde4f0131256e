"""The clear sequential implementation of `tests/reference`, with a DataLoader per client.

Pictures go through torchvision transforms one by one, as a plain script would do it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from client_app.data.examples import ClientData
from common.errors import ConfigError
from experiments.benchmarks.timing import synchronize
from server_app.hypernet.network import Hypernetwork

Batch = tuple[Tensor, Tensor]


class Pictures(Dataset[Batch]):
    """Pictures as PIL images, made into normalised tensors one by one on every access."""

    def __init__(self, images: Tensor, labels: Tensor, data: ClientData) -> None:
        to_pil = transforms.ToPILImage()
        self._pictures = [to_pil(image) for image in images.cpu()]
        self._labels = labels.cpu()
        self._transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize(data.mean.tolist(), data.std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Batch:
        return self._transform(self._pictures[index]), self._labels[index]


def train_loader(data: ClientData, batch_size: int) -> DataLoader[Batch]:
    """Return a shuffled DataLoader over the train examples."""
    pictures = Pictures(data.train_images, data.train_labels, data)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(pictures, batch_size, shuffle=True, generator=generator)


def held_out_loader(data: ClientData, batch_size: int) -> DataLoader[Batch]:
    """Return a DataLoader over the test examples."""
    return DataLoader(Pictures(data.test_images, data.test_labels, data), batch_size)


def reference() -> Any:
    """Return the module tests.reference.algorithm; raise ConfigError outside the repository."""
    try:
        return importlib.import_module("tests.reference.algorithm")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the clear reference lives in tests/reference, which is not installed with the "
            "package. Run bench from the root of the repository: python -m experiments bench"
        ) from error


def reference_hypernet(hypernet: Hypernetwork, device: torch.device | str = "cpu") -> Any:
    """Return the reference's hypernetwork with the state of the system's, on a device."""
    algorithm = reference()
    tensors, meta = hypernet.state_dict()
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return algorithm.ReferenceHypernet(moved, meta, hyper=algorithm.Hyper())


def reference_round(
    hypernet: Any, clients: dict[str, ClientData], build: Any, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Run one sequential round and a test of everybody; returns seconds by part.

    `build()` makes a client's model on `device`, where the hypernetwork is too; batches go there
    one by one. The data loaders are made before the clock starts.
    """
    algorithm, seconds = reference(), {"train": 0.0, "server": 0.0, "evaluate": 0.0}
    loaders = {c: (train_loader(d, 64), held_out_loader(d, 64)) for c, d in clients.items()}
    started = time.process_time()
    for client_id, (train, _) in loaders.items():
        with _clock(seconds, "server"):
            theta = hypernet.theta(client_id).detach().clone()
        with _clock(seconds, "train"):
            model = algorithm.load_theta(build(), theta)
            algorithm.local_training(model, moved(train, device), hyper=hypernet.hyper, clip=50.0)
            delta = theta - algorithm.read_theta(model)
        with _clock(seconds, "server"):
            _server_step(hypernet, client_id, delta)
    for client_id, (_, test) in loaders.items():
        with _clock(seconds, "evaluate"), torch.no_grad():
            model = algorithm.load_theta(build(), hypernet.theta(client_id))
            _accuracy(model.eval(), moved(test, device))
    total = sum(seconds.values())
    return seconds | {"total": total, "cpu_seconds": time.process_time() - started}


def _server_step(hypernet: Any, client_id: str, delta: Tensor) -> None:
    hypernet.adam.zero_grad(set_to_none=True)
    (hypernet.theta(client_id) @ delta).backward()
    parameters = [p for group in hypernet.adam.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 50.0)
    hypernet.adam.step()


def moved(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Yield batches on a device."""
    for images, labels in batches:
        yield images.to(device), labels.to(device)


def _accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    hits = [(model(images).argmax(1) == labels).float() for images, labels in batches]
    return float(torch.cat(hits).mean())


@contextmanager
def _clock(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Add the seconds of a block to one entry, what a GPU has yet to do included."""
    started = time.perf_counter()
    yield
    synchronize()
    seconds[key] += time.perf_counter() - started
