"""The clear sequential implementation of `tests/reference`, with a DataLoader per client.

Pictures go through torchvision transforms one by one, as a plain script would do it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from client_app.data.examples import ClientData
from common.errors import ConfigError
from experiments.benchmarks.measuring import Row, synchronize
from server_app.hypernet.network import Hypernetwork

BATCH = 64
CLIP_NORM = 50.0
Batch = tuple[Tensor, Tensor]


class Pictures(Dataset[Batch]):
    """Pictures as PIL images, made into normalised tensors one by one on every access."""

    def __init__(self, images: Tensor, labels: Tensor, data: ClientData) -> None:
        to_pil = transforms.ToPILImage()
        self._pictures = [to_pil(image) for image in images.cpu()]
        self._labels = labels.cpu()
        normalize = transforms.Normalize(data.mean.tolist(), data.std.tolist())
        self._transform = transforms.Compose([transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Batch:
        return self._transform(self._pictures[index]), self._labels[index]


def train_loader(data: ClientData) -> DataLoader[Batch]:
    """Return a shuffled DataLoader over the train examples."""
    pictures = Pictures(data.train_images, data.train_labels, data)
    return DataLoader(pictures, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


def reference() -> Any:
    """Return the module tests.reference.algorithm; raise ConfigError outside the repository."""
    try:
        return importlib.import_module("tests.reference.algorithm")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "bench: the clear reference is in tests/reference. Run it from the root of the "
            "repository: uv run mh-pfedhn bench"
        ) from error


def reference_hypernet(hypernet: Hypernetwork, device: str = "cpu") -> Any:
    """Return the reference's hypernetwork with the state of the system's, on a device."""
    tensors, facts = hypernet.state_dict()
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return reference().ReferenceHypernet(moved, facts, hyper=reference().Hyper())


def server_step(hypernet: Any, client_id: str, delta: Tensor) -> None:
    """Take one client's turn in the clear reference: generate, backward, clip, Adam."""
    hypernet.adam.zero_grad(set_to_none=True)
    (hypernet.theta(client_id) @ delta).backward()
    parameters = [p for group in hypernet.adam.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], CLIP_NORM)
    hypernet.adam.step()


def reference_round(
    hypernet: Any,
    clients: Mapping[str, ClientData],
    build: Callable[[], nn.Module],
    device: str = "cpu",
) -> Row:
    """Run one sequential round and a test of everybody; return seconds by part, as a run does.

    `build` makes a client's model on `device`, where the hypernetwork is too; batches go there one
    by one. The data loaders are made before the clock starts.
    """
    algorithm, seconds = reference(), {"clients": 0.0, "server": 0.0, "evaluate": 0.0}
    loaders = {
        client_id: (
            train_loader(data),
            DataLoader(Pictures(data.test_images, data.test_labels, data), BATCH),
        )
        for client_id, data in clients.items()
    }
    started = time.process_time()
    for client_id, (train, _) in loaders.items():
        with _clock(seconds, "server"):
            theta = hypernet.theta(client_id).detach().clone()
        with _clock(seconds, "clients"):
            model = algorithm.load_theta(build(), theta)
            batches = moved(train, device)
            algorithm.local_training(model, batches, hyper=hypernet.hyper, clip=CLIP_NORM)
            delta = theta - algorithm.read_theta(model)
        with _clock(seconds, "server"):
            server_step(hypernet, client_id, delta)
    for client_id, (_, test) in loaders.items():
        with _clock(seconds, "evaluate"), torch.no_grad():
            model = algorithm.load_theta(build(), hypernet.theta(client_id)).eval()
            for images, labels in moved(test, device):
                (model(images).argmax(1) == labels).float().mean()
    row = {f"seconds_{part}": spent for part, spent in seconds.items()}
    total = {"seconds_round": sum(seconds.values()), "cpu_seconds": time.process_time() - started}
    return row | total


def moved(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Yield batches on a device."""
    for images, labels in batches:
        yield images.to(device), labels.to(device)


@contextmanager
def _clock(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Add the seconds of a block to one entry, what a GPU has yet to do included."""
    started = time.perf_counter()
    yield
    synchronize()
    seconds[key] += time.perf_counter() - started
