"""The examples of one client: source -> partition -> tensors on the device.

Pictures are decoded once into a cache that all client processes map (`cache`), a client's rows are
drawn once (`partitions`), and a batch is an index into tensors that already are on the device.

Shapes: N examples, B batch, C channels, H = W image size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client_app.data.augment import OwnAugmentation, draw_moves, moved, own_augmentation
from client_app.data.cache import DecodedDataset, open_dataset
from client_app.data.colours import with_channels
from client_app.data.labels import scale_of
from client_app.data.losses import OwnLoss, own_loss
from client_app.data.partitions import client_indices, client_parts
from client_app.data.select import select_source
from client_app.data.source import CLASSES, LABELS, NUMBERS
from client_app.data.splits import Indices
from common.config import ClientSection, named_augmentations, named_classes
from common.errors import DataError


@dataclass(frozen=True)
class ClientData:
    """One client's train, validation and test examples, on the device.

    What a client predicts with is chosen on the validation examples, which may be none.

    Images are (N, C, H, W) uint8, in channels-last memory, which batches inherit (convolutions on
    CPU are up to 1.5 times as fast), mean and std (C,) float32 in units of full intensity; or no
    pictures, (N, ...) float32 or int64, without mean and std. Labels are of one of `TARGETS`;
    numbers are minus `label_mean`, divided by `label_std` (C,), of the train part, which
    of other labels are empty. `num_classes` counts a model's outputs. `augmentation`
    names how train examples are changed, `test_rows` (N,) int64 which examples of the source are
    tested on. `about` as `data.source.Examples` has it; `loss` is descended in place of that of
    the labels' kind, `augment` changes a batch of train examples as a participant's code says.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    mean: Tensor
    std: Tensor
    num_classes: int
    in_channels: int
    test_rows: Indices | None = None
    augmentation: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    label_mean: Tensor = field(default_factory=lambda: torch.empty(0))
    label_std: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: OwnLoss | None = None
    augment: OwnAugmentation | None = None

    @property
    def target(self) -> str:
        """What the examples are labelled with, one of `source.TARGETS`."""
        kinds = {torch.bool: LABELS, torch.float32: NUMBERS}
        return kinds.get(self.train_labels.dtype, CLASSES)

    @property
    def num_train(self) -> int:
        """Number of train examples."""
        return len(self.train_labels)

    @property
    def is_pictures(self) -> bool:
        """Whether examples are pictures, which are normalised; others are taken as they are."""
        return len(self.mean) > 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train_images.shape[1:])

    @property
    def input_dtype(self) -> torch.dtype:
        """What a model gets: float32, or int64 for token ids."""
        return torch.float32 if self.is_pictures else self.train_images.dtype

    @property
    def num_test(self) -> int:
        """Number of test examples."""
        return len(self.test_labels)

    @property
    def num_bytes(self) -> int:
        """Bytes that the examples and their labels occupy on the device."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    @cached_property
    def looks(self) -> tuple[float | int, ...]:
        """What normalised pictures have in common with another client's: mean, std, shape."""
        return (*self.mean.tolist(), *self.std.tolist(), *self.input_shape)

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(1, C, 1, 1) each, so that normalised = shift + scale * image."""
        scale, shift = 1.0 / (255.0 * self.std), -self.mean / self.std
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, C, H, W) to float32 (image / 255 - mean) / std, in one pass."""
        if not self.is_pictures:
            return images
        scale, shift = self._scale_and_shift
        return torch.addcmul(shift, images, scale)

    def num_used(self, batch_size: int) -> int:
        """Return how many examples an epoch trains on: a last batch of one is left out.

        BatchNorm over vectors cannot take one alone.
        """
        return self.num_train - (self.num_train > batch_size > 1 == self.num_train % batch_size)

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the train examples once as drawn from `generator`; last batch kept, if not of one.

        Images (B, C, H, W) float32, normalised, and labels (B,) int64, both on the device.
        """
        epoch = self.draw_epoch(generator).to(self.train_labels.device)
        for start in range(0, self.num_used(batch_size), batch_size):
            rows, *moves = epoch[:, start : start + batch_size]
            images = self.train_images[rows]
            if self.augmentation:
                images = moved(images, torch.stack(moves))
            elif self.augment:
                images = self.augment(images, generator)
            yield self.normalise(images), self.train_labels[rows]

    def draw_epoch(self, generator: torch.Generator) -> Tensor:
        """Draw the order of the train examples, (1, N) int64 on the generator's device.

        With an augmentation it is (4, N): their `draw_moves` too, in the same order.
        """
        count, device = self.num_train, generator.device
        order = torch.randperm(count, generator=generator, device=device)[None]
        if not self.augmentation:
            return order
        size = self.train_images.shape[-1]
        return torch.cat([order, draw_moves(self.augmentation, count, size, generator)])

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test examples once, in a fixed order; as `batches`."""
        return self._in_order(self.test_images, self.test_labels, batch_size)

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the validation examples once, in a fixed order; as `batches`."""
        return self._in_order(self.validation_images, self.validation_labels, batch_size)

    def _in_order(
        self, images: Tensor, labels: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), batch_size):
            span = slice(start, start + batch_size)
            yield self.normalise(images[span]), labels[span]


def load_client_data(
    section: ClientSection,
    *,
    partition_id: int,
    seed: int,
    device: torch.device,
    split_seed: int | None = None,
) -> ClientData:
    """Load one client's examples; the same arguments give the same split in every process.

    `seed` says who has which examples, `split_seed` which of them are held back; None: `seed` too.

    The last clients loaded stay in memory (512 MiB in a process), so a repeated call is free; a
    source that changes is noticed by new processes. Raises as `prepare_data`, and where the client
    (0 to num_partitions - 1; any for partition "none") does not exist or has fewer than two.
    """
    key = (section, partition_id, seed, device, seed if split_seed is None else split_seed)
    return LOADED.get(key, lambda: _load(*key))


class LoadedClients:
    """The clients loaded last, of at most `max_bytes` together; shared by all threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._clients: OrderedDict[Hashable, ClientData] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], ClientData]) -> ClientData:
        """Return what is kept under a key, or load and keep it; the oldest go."""
        with self._lock:
            if key not in self._clients:
                self._clients[key] = load()
                self._num_bytes += self._clients[key].num_bytes
            self._clients.move_to_end(key)
            while len(self._clients) > 1 and self._num_bytes > self._max_bytes:
                self._num_bytes -= self._clients.popitem(last=False)[1].num_bytes
            return self._clients[key]

    def clear(self) -> None:
        """Forget all of them."""
        self._clients.clear()
        self._num_bytes = 0


LOADED = LoadedClients(max_bytes=512 << 20)


def open_examples(section: ClientSection, *, anew: bool = False) -> DecodedDataset:
    """Open the examples of all clients together; raises as `prepare_data`."""
    if anew:
        LOADED.clear()
    names = named_classes(section.class_names)
    found = open_dataset(
        select_source(section.dataset, section.data_dir, names, section.intensity),
        name=section.dataset,
        image_size=section.image_size,
        cache_dir=section.cache_dir,
        anew=anew,
    )
    return with_channels(found, section.channels)


def _load(
    section: ClientSection, partition_id: int, seed: int, device: torch.device, split_seed: int
) -> ClientData:
    dataset = open_examples(section)
    rows = client_indices(dataset, section, partition_id=partition_id, seed=seed, cap=split_seed)
    labels = dataset.labels[rows]
    if dataset.num_classes < 2 and labels.ndim == 1:
        raise DataError(f"{section.dataset} has one class; there is nothing to tell apart.")
    train, validation, test = client_parts(
        dataset, section, rows, partition_id=partition_id, seed=split_seed
    )
    test = validation if section.tested_on == "validation" else test

    def images(positions: Indices) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(dataset.images[rows[positions]]))
        layout = torch.channels_last if pixels.ndim == 4 else torch.contiguous_format
        return pixels.to(device).contiguous(memory_format=layout)

    if (augmentation := named_augmentations(section.augmentation)) and not dataset.mean:
        raise DataError(
            f"augmentation = {section.augmentation!r} is for pictures, and {section.dataset} gives "
            f"{dataset.images.dtype} {dataset.images.shape}. Set augmentation = 'none'."
        )

    label_mean, label_std = scale_of(
        torch.from_numpy(labels[train]), is_private=section.dp_noise > 0
    )

    def targets(positions: Indices) -> Tensor:
        found = torch.from_numpy(labels[positions])
        return ((found - label_mean) / label_std if len(label_std) else found).to(device)

    data = ClientData(
        train_images=images(train),
        train_labels=targets(train),
        test_images=images(test),
        test_labels=targets(test),
        validation_images=images(validation),
        validation_labels=targets(validation),
        mean=torch.tensor(dataset.mean, device=device),
        std=torch.tensor(dataset.std, device=device),
        num_classes=dataset.num_classes,
        in_channels=dataset.in_channels,
        test_rows=np.asarray(rows)[test],
        augmentation=augmentation,
        about=dataset.about,
        label_mean=label_mean,
        label_std=label_std,
        augment=own_augmentation(section.augmentation),
    )
    loss = own_loss(section.loss, data.train_labels, data.target, data.num_classes)
    return replace(data, loss=loss)
