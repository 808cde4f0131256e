"""The examples of one client: source -> partition -> tensors on the device.

Pictures are decoded once into a cache that all client processes map (`datasets.cache`), a client's
rows are drawn once (`datasets.partitions`), and a batch is an index into tensors that already are
on the device. Nothing here is done picture by picture.

Shapes: N examples, B batch, C channels, H = W image size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client_app.data.cache import DecodedDataset, open_dataset
from client_app.data.partitions import WHOLE, client_indices
from client_app.data.select import select_source
from client_app.data.splits import Indices, split_train_test
from common.config.client import ClientSection
from common.errors import DataError
from common.seeding import numpy_generator

# keys of the client section that decide which examples a client has
_DATA_KEYS = (
    "dataset", "data_dir", "cache_dir", "partition", "num_partitions", "classes_per_client",
    "dirichlet_alpha", "min_client_examples", "max_client_examples", "partition_options",
    "test_fraction", "image_size",
)  # fmt: skip
_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class ClientData:
    """One client's train and test examples, on the device.

    Attributes
    ----------
    train_images, test_images
        (N, C, H, W) uint8, in channels-last memory: batches inherit it, and convolutions on CPU
        are up to 1.5 times as fast with it.
    train_labels, test_labels
        (N,) int64.
    mean, std
        (C,) float32, in units of full intensity.
    test_rows
        (N,) int64: which examples of the source the test examples are, so that a stored model's
        accuracy can be checked without this project.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    num_classes: int
    in_channels: int
    test_rows: Indices | None = None

    @property
    def num_train(self) -> int:
        """Number of train examples."""
        return len(self.train_labels)

    @property
    def num_test(self) -> int:
        """Number of test examples."""
        return len(self.test_labels)

    @property
    def num_bytes(self) -> int:
        """Bytes that the examples occupy on the device."""
        pictures = self.train_images.nbytes + self.test_images.nbytes
        return pictures + self.train_labels.nbytes + self.test_labels.nbytes

    @cached_property
    def looks(self) -> tuple[float | int, ...]:
        """What normalised pictures have in common with another client's: mean, std, shape."""
        shape = self.train_images.shape[1:]
        return (*self.mean.tolist(), *self.std.tolist(), *shape)

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(1, C, 1, 1) each, so that normalised = shift + scale * image."""
        scale = 1.0 / (255.0 * self.std)
        shift = -self.mean / self.std
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, C, H, W) to float32 (image / 255 - mean) / std, in one pass."""
        scale, shift = self._scale_and_shift
        return torch.addcmul(shift, images, scale)

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the train examples once in an order drawn from `generator`; last batch kept.

        Yields
        ------
        images (B, C, H, W) float32, normalised; labels (B,) int64; both on the device.
        """
        order = torch.randperm(self.num_train, generator=generator, device=generator.device)
        order = order.to(self.train_labels.device)
        for start in range(0, self.num_train, batch_size):
            rows = order[start : start + batch_size]
            yield self.normalise(self.train_images[rows]), self.train_labels[rows]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test examples once, in a fixed order; as `batches`."""
        for start in range(0, self.num_test, batch_size):
            span = slice(start, start + batch_size)
            yield self.normalise(self.test_images[span]), self.test_labels[span]


def prepare_data(section: ClientSection, *, seed: int) -> Path:
    """Decode the data set and draw the partition, unless that was done before.

    Safe to call from many processes at once. The command line calls it before a run, so that the
    first round does not wait.

    Returns
    -------
    The folder of the cache entry.

    Raises
    ------
    ConfigError, DataError
        The section does not describe data that can be loaded and divided.
    """
    dataset = open_examples(section)
    client_indices(dataset, section, partition_id=0, seed=seed)
    return dataset.folder


def describe_data(section: ClientSection) -> tuple[int, int]:
    """Return (in_channels, num_classes) of the data set: what a model is built for."""
    dataset = open_examples(section)
    return len(dataset.mean), dataset.num_classes


def load_client_data(
    section: ClientSection, *, partition_id: int, seed: int, device: torch.device
) -> ClientData:
    """Load one client's examples; the same arguments give the same split in every process.

    The last clients loaded stay in memory (512 MiB in a process), so a repeated call is free; a
    source that changes is noticed by new processes.

    Parameters
    ----------
    section
        Which data, how divided.
    partition_id
        Which client, 0 to num_partitions - 1; anything for partition "none".
    seed
        Seed of the run.
    device
        Where the tensors go.

    Raises
    ------
    ConfigError, DataError
        As `prepare_data`, or the client does not exist or has fewer than two examples.
    """
    key = (*(getattr(section, name) for name in _DATA_KEYS), partition_id, seed, str(device))
    with _recent_lock:
        found = _recent.get(key)
        if found is None:
            found = _load(section, partition_id, seed, device)
            _recent[key] = found
            while len(_recent) > 1 and sum(d.num_bytes for d in _recent.values()) > _MEMORY_BYTES:
                _recent.popitem(last=False)
        _recent.move_to_end(key)
        return found


_recent: OrderedDict[tuple[Any, ...], ClientData] = OrderedDict()
_recent_lock = threading.Lock()


def open_examples(section: ClientSection) -> DecodedDataset:
    """Open the decoded pictures and labels of all clients together; raises as `prepare_data`."""
    source = select_source(section.dataset, section.data_dir)
    return open_dataset(
        source,
        name=section.dataset,
        image_size=section.image_size,
        cache_dir=section.cache_dir,
    )


def _load(section: ClientSection, partition_id: int, seed: int, device: torch.device) -> ClientData:
    dataset = open_examples(section)
    rows = client_indices(dataset, section, partition_id=partition_id, seed=seed)
    client = WHOLE if section.partition == WHOLE else str(partition_id)
    rng = numpy_generator(seed, "train-test", client_id=client)
    labels = dataset.labels[rows]
    try:
        train, test = split_train_test(labels, test_fraction=section.test_fraction, rng=rng)
    except DataError as error:
        raise DataError(f"{section.dataset}, client {partition_id}: {error}") from error

    def images(positions: Indices) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(dataset.images[rows[positions]]))
        return pixels.to(device).contiguous(memory_format=torch.channels_last)

    def targets(positions: Indices) -> Tensor:
        return torch.from_numpy(labels[positions]).to(device)

    return ClientData(
        train_images=images(train),
        train_labels=targets(train),
        test_images=images(test),
        test_labels=targets(test),
        mean=torch.tensor(dataset.mean, device=device),
        std=torch.tensor(dataset.std, device=device),
        num_classes=dataset.num_classes,
        in_channels=len(dataset.mean),
        test_rows=np.asarray(rows)[test],
    )
