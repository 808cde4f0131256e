"""A client's examples: cache, partition, split, tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.data.prepare import prepare_data
from common.config import ClientSection
from common.errors import ConfigError, DataError
from tests.support.close import assert_close
from tests.unit.client_app.pictures import (
    REPOSITORY,
    changed,
    load,
    random_pixels,
)


def test_client_data_has_the_promised_shapes(section: ClientSection) -> None:
    client = load(section)
    assert client.train_images.shape == (client.num_train, 3, 32, 32)
    assert client.train_images.dtype == client.test_images.dtype == torch.uint8
    assert client.train_labels.dtype == client.test_labels.dtype == torch.int64
    assert client.num_test == round(0.25 * (client.num_train + client.num_test))
    assert (client.num_classes, client.in_channels) == (10, 3)
    labels = torch.cat([client.train_labels, client.test_labels])
    assert len(labels.unique()) == 2  # the published pathological partition of cifar10


def test_every_picture_is_the_one_of_its_label(section: ClientSection) -> None:
    """Picture i of the source has label i % 10; nobody else has it."""
    source = torch.from_numpy(random_pixels(300, 32, 32, 3)).permute(0, 3, 1, 2)
    seen: list[int] = []
    for partition_id in range(6):
        client = load(section, partition_id)
        for images, labels in (
            (client.train_images, client.train_labels),
            (client.test_images, client.test_labels),
        ):
            for image, label in zip(images, labels, strict=True):
                row = int((source == image).flatten(1).all(1).nonzero()[0, 0])
                assert row % 10 == label
                seen.append(row)
    assert len(seen) == len(set(seen))


def test_validation_examples_are_held_back_ones_that_no_test_counts(section: ClientSection) -> None:
    def pictures(images: torch.Tensor) -> list[bytes]:
        return [image.contiguous().numpy().tobytes() for image in images]

    whole, parted = load(section), load(changed(section, validation_fraction=0.1))
    assert pictures(parted.train_images) == pictures(whole.train_images)
    tested, chosen_on = pictures(parted.test_images), pictures(parted.validation_images)
    assert len(chosen_on) == round(0.4 * whole.num_test)
    assert sorted(tested + chosen_on) == sorted(pictures(whole.test_images))
    assert not set(tested) & set(chosen_on)
    assert len(whole.validation_labels) == 0


def test_normalise_is_the_textbook_formula(section: ClientSection) -> None:
    client = load(section)
    images = client.test_images[:5]
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(1, 3, 1, 1)
    normalised = client.normalise(images)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, (images / 255 - mean) / std, rtol=0, atol=2e-6)
    assert normalised.is_contiguous(memory_format=torch.channels_last)


def test_batches_visit_every_example_once_in_the_generators_order(section: ClientSection) -> None:
    client = load(section)

    def epoch(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(client.batches(16, torch.Generator().manual_seed(seed)))

    first, again, other = epoch(1), epoch(1), epoch(2)
    sizes = [len(labels) for _, labels in first]
    full, rest = divmod(client.num_train, 16)
    assert sizes == [16] * full + [rest] * bool(rest)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    visited = torch.cat([labels for _, labels in first]).sort().values
    assert torch.equal(visited, client.train_labels.sort().values)
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)


def test_test_batches_keep_order_and_the_last_batch(section: ClientSection) -> None:
    client = load(section)
    batches = list(client.test_batches(7))
    assert torch.equal(torch.cat([labels for _, labels in batches]), client.test_labels)
    images = torch.cat([images for images, _ in batches])
    assert_close(images, client.normalise(client.test_images))


# determinism, across processes too

SCRIPT = """
import json, sys, zlib, torch
from client_app.data.examples import load_client_data
from common.config import ClientSection
client = load_client_data(
    ClientSection(**json.loads(sys.argv[1])), partition_id=3, seed=42, device=torch.device("cpu")
)
heavy = {"datasets", "flwr_datasets", "flwr", "sklearn", "torchvision"} & set(sys.modules)
print(zlib.crc32(client.train_images.contiguous().numpy().tobytes()), client.num_test, heavy)
"""


def test_processes_that_start_together_get_the_same_data(section: ClientSection) -> None:
    command = [sys.executable, "-c", SCRIPT, section.model_dump_json()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert printed[0] == printed[1]
    assert printed[0].endswith("set()\n")  # nothing slow was imported
    assert len(list(Path(section.cache_dir).glob("cifar10-*/images.npy"))) == 1


def test_a_participant_with_its_own_data_has_all_of_it(section: ClientSection) -> None:
    whole = load(changed(section, partition="none"), partition_id=-1)
    assert whole.num_train + whole.num_test == 300
    assert torch.equal(
        whole.train_images, load(changed(section, partition="none"), 5, 42).train_images
    )


# bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": "cifar01"}, ConfigError, r"unknown dataset 'cifar01'\. Did you mean"),
        ({"partition": "pathologic"}, ConfigError, r"Did you mean 'pathological'\?"),
        ({"classes_per_client": 11}, DataError, "classes-per-client = 11, but the data has 10"),
        ({"partition_options": "{"}, ConfigError, r"partition-options = '\{' is not JSON"),
        ({"partition_options": "[1]"}, ConfigError, "must be a JSON object"),
        ({"partition_options": '{"a": 1}'}, ConfigError, "takes no partition-options"),
        ({"num_partitions": 151}, DataError, "151 clients need at least 302 examples"),
        (
            {"num_partitions": 140, "classes_per_client": 1},
            DataError,
            r"pathological: client \d+ of 140 would have [01] example\(s\)",
        ),
        (
            {"partition": "dirichlet", "num_partitions": 10},
            DataError,
            "10 clients with more than 30 examples each need 310 examples, the data has 300",
        ),
        (
            {"partition": "dirichlet", "min_client_examples": 48},
            DataError,
            r"none of 10000 draws with alpha 0.1 gave each of 6 clients more than 48 examples; "
            r"in the best one the smallest client had \d+\. Use a larger dirichlet-alpha",
        ),
        ({"partition": "iid", "partition_options": '{"a": 1}'}, ConfigError, "unexpected keyword"),
    ],
)
def test_data_that_cannot_be_divided(
    section: ClientSection, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare_data(changed(section, **changes), seed=42)


@pytest.mark.parametrize("partition", ["pathological", "none"])
def test_cap_on_a_clients_examples(section: ClientSection, partition: str) -> None:
    full = changed(section, partition=partition)
    capped = changed(full, max_client_examples=16)
    everything, some, other = load(full, 2), load(capped, 2), load(capped, 2, seed=7)
    assert (some.num_train, some.num_test) == (12, 4)
    assert everything.num_train + everything.num_test > 16
    assert set(some.train_labels.tolist()) <= set(everything.train_labels.tolist())
    assert not torch.equal(some.train_images, other.train_images)
    roomy = load(changed(full, max_client_examples=1000), 2)
    assert torch.equal(roomy.train_images, everything.train_images)


def test_cap_that_leaves_nothing_to_test(section: ClientSection) -> None:
    with pytest.raises(ConfigError, match=r"max-client-examples = 1, .* Set it to 2 or more"):
        prepare_data(changed(section, max_client_examples=1), seed=42)


@pytest.mark.parametrize("partition_id", [-1, 6])
def test_partition_id_out_of_range(section: ClientSection, partition_id: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"partition-id = {partition_id} is not in 0\.\.5 .*partition = 'none'"
    ):
        load(section, partition_id)
