"""What a participant's function returns, and how its examples are divided."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from client_app.data.examples import ClientData, load_client_data
from common.config import ClientSection
from common.errors import DataError
from tests.cases.test_pictures import grey
from tests.cases.test_tensors import cancer

HERE = __name__
CPU = torch.device("cpu")
Pair = tuple[NDArray[Any], NDArray[Any]]


def as_dataset() -> TensorDataset:
    inputs, labels = cancer()
    return TensorDataset(torch.from_numpy(inputs).float(), torch.from_numpy(labels))


def own_split() -> dict[str, Pair]:
    inputs, labels = cancer()
    return {"train": (inputs[:300], labels[:300]), "test": (inputs[300:], labels[300:])}


def three_parts() -> dict[str, Pair]:
    inputs, labels = cancer()
    cuts = {"train": slice(300), "validation": slice(300, 400), "test": slice(400, None)}
    return {name: (inputs[cut], labels[cut]) for name, cut in cuts.items()}


PATIENTS = np.arange(569) // 7


def by_patient() -> dict[str, Any]:
    inputs, labels = cancer()
    return {"inputs": inputs, "labels": labels, "groups": [f"p{n}" for n in PATIENTS]}


DAYS = np.datetime64("2026-01-01") + np.random.default_rng(3).permutation(569)


def by_day() -> dict[str, Any]:
    inputs, labels = cancer()
    return {"inputs": inputs, "labels": labels, "times": DAYS}


def misspelt() -> dict[str, Any]:
    return by_day() | {"days": 1}


def one_patient() -> dict[str, Any]:
    return by_patient() | {"groups": ["p"] * 569}


def only_tests() -> dict[str, Pair]:
    inputs, labels = cancer()
    return {"train": (inputs[:0], labels[:0]), "test": (inputs, labels)}


def section(folder: Path, function: Callable[[], Any], **own: Any) -> ClientSection:
    facts = {"cache_dir": str(folder / "cache"), "partition": "none", "models": "perceptron"}
    return ClientSection(**{**facts, "dataset": f"{HERE}:{function.__name__}", **own})


def load(folder: Path, function: Callable[[], Any], seed: int = 1, **own: Any) -> ClientData:
    wanted = section(folder, function, **own)
    return load_client_data(wanted, partition_id=-1, seed=seed, device=CPU)


def test_a_torch_dataset_is_read(tmp_path: Path) -> None:
    data, same = load(tmp_path, as_dataset), load(tmp_path, cancer)
    assert data.train_images.shape[1:] == (30,)
    assert data.train_images.dtype == torch.float32
    assert torch.equal(data.train_images, same.train_images)
    assert data.normalise(data.train_images) is data.train_images


def test_a_division_of_its_own_is_kept(tmp_path: Path) -> None:
    inputs = torch.from_numpy(cancer()[0]).float()
    data = load(tmp_path, three_parts)
    assert torch.equal(data.train_images, inputs[:300])
    assert torch.equal(data.validation_images, inputs[300:400])
    assert torch.equal(data.test_images, inputs[400:])
    data = load(tmp_path, own_split)
    assert (data.num_train, len(data.validation_labels), data.num_test) == (270, 30, 269)
    assert torch.equal(data.test_images, inputs[300:])
    assert load(tmp_path, own_split, validation_fraction=0.0).num_train == 300


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_patient_is_in_two_parts(tmp_path: Path, seed: int) -> None:
    data = load(tmp_path, by_patient, seed)
    inputs = torch.from_numpy(cancer()[0]).float()
    row_of = {tuple(row.tolist()): number for number, row in enumerate(inputs)}
    images = (data.train_images, data.validation_images, data.test_images)
    parts = [{int(PATIENTS[row_of[tuple(x.tolist())]]) for x in part} for part in images]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 82
    assert abs(data.num_test / 569 - 0.15) < 0.03
    assert abs(len(data.validation_labels) / 569 - 0.1) < 0.03
    assert data.test_rows is not None
    assert set(PATIENTS[data.test_rows]) == parts[2]


def test_the_latest_are_tested_on(tmp_path: Path) -> None:
    data, other = load(tmp_path, by_day), load(tmp_path, by_day, seed=2)
    assert data.test_rows is not None
    assert set(data.test_rows) == set(np.argsort(DAYS)[-data.num_test :])
    assert torch.equal(data.test_images, other.test_images)
    assert (data.num_train, len(data.validation_labels), data.num_test) == (427, 57, 85)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (misspelt, r"a dict of days, inputs, labels, times; expected \(inputs, labels\)"),
        (one_patient, "groups are all the same: nothing can be held back"),
        (only_tests, "0 examples to train and 569 to test; both need some"),
    ],
)
def test_a_division_that_cannot_be_used_is_named(
    tmp_path: Path, function: Callable[[], Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        load(tmp_path, function)


def test_pictures_in_folders_of_parts(tmp_path: Path) -> None:
    for part, count in {"train": 6, "val": 3, "test": 4}.items():
        for name in ("a", "b"):
            for j in range(count):
                grey(tmp_path / "d" / part / name / f"{j}.png", 10 * count)
    own = {"dataset": "folder", "data_dir": str(tmp_path / "d"), "image_size": 8}
    data = load(tmp_path, cancer, **own)
    assert (data.num_train, len(data.validation_labels), data.num_test) == (12, 6, 8)
    assert set(data.train_images.flatten().tolist()) == {60}
    assert set(data.test_images.flatten().tolist()) == {40}
    assert data.about["class_names"] == ["a", "b"]


def test_pictures_are_augmented_and_tensors_are_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"augmentation = 'flip' is for pictures, and .*float32"):
        load(tmp_path, cancer, augmentation="flip")
