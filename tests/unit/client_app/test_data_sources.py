"""Where pictures come from: hub, parquet, IDX, folders, functions, scikit-learn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_app.data import published
from client_app.data.catalogue import CATALOGUE, DatasetSpec
from client_app.data.own import FolderSource
from client_app.data.published import HubSource, IdxSource, ParquetSource
from client_app.data.select import select_source
from client_app.data.source import Examples
from common.errors import ConfigError, DataError
from tests.unit.client_app.pictures import (
    encode,
    random_pixels,
    write_idx,
    write_parquet,
)


def _all(examples: Examples) -> np.ndarray:
    return np.stack([examples.read_example(i) for i in range(len(examples.labels))])


# published data sets


@pytest.mark.parametrize(
    "place",
    [
        "cifar100/train.parquet",
        "cifar100/train-00000-of-00001.parquet",
        "cifar100/data/train-00000-of-00001.parquet",
        "cifar100/cifar100/train-00000-of-00001.parquet",
        "train.parquet",
        "data/train-00000-of-00001-abc123.parquet",
    ],
)
def test_parquet_is_found_where_the_hub_or_a_person_puts_it(tmp_path: Path, place: str) -> None:
    path = write_parquet(
        tmp_path / place, random_pixels(3, 32, 32, 3), [5, 99, 0], columns=("img", "fine_label")
    )
    source = select_source("cifar100", str(tmp_path))
    assert source == ParquetSource("cifar100", (path,))
    examples = source.read(32)
    assert examples.labels.tolist() == [5, 99, 0]
    assert examples.labels.dtype == np.int64
    assert (examples.num_classes, examples.mean) == (100, (0.5071, 0.4865, 0.4409))
    assert np.array_equal(_all(examples), random_pixels(3, 32, 32, 3).transpose(0, 3, 1, 2))


def test_shards_are_read_in_order_and_none_may_miss(tmp_path: Path) -> None:
    for shard in range(2):
        name = f"tiny-imagenet/data/train-0000{shard}-of-00002.parquet"
        columns = ("image", "label")
        write_parquet(tmp_path / name, random_pixels(2, 64, 64, 3), [shard] * 2, columns=columns)
    examples = select_source("tiny-imagenet", str(tmp_path)).read(32)
    assert examples.labels.tolist() == [0, 0, 1, 1]
    assert examples.read_example(3).shape == (3, 32, 32)
    (tmp_path / "tiny-imagenet/data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"has 1 of the 2 shards"):
        select_source("tiny-imagenet", str(tmp_path))


def test_another_data_set_in_the_same_folder_is_not_taken(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cifar100/train.parquet", random_pixels(1, 32, 32, 3), [0])
    with pytest.raises(
        DataError, match=r"no cifar10 in data-dir .*expected cifar10/train\.parquet or .*uoft-cs"
    ):
        select_source("cifar10", str(tmp_path))


def test_wrong_columns_and_labels_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "cifar10/train.parquet"
    write_parquet(path, random_pixels(1, 32, 32, 3), [0], columns=("picture", "label"))
    source = select_source("cifar10", str(tmp_path))
    with pytest.raises(DataError, match="has the columns picture, label; expected one named img"):
        source.read(32)
    write_parquet(path, random_pixels(2, 32, 32, 3), [0, 10])
    with pytest.raises(DataError, match=r"label from 0 to 9 for each of 2 .*, 0\.\.10\. Is it an"):
        source.read(32)
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"cannot read .*train\.parquet"):
        source.read(32)


def test_the_hub_is_read_with_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """load_dataset takes a folder in the hub's layout as it takes a repository's name."""
    import datasets

    pixels = random_pixels(4, 32, 32, 3)
    write_parquet(tmp_path / "repo/data/train-00000-of-00001.parquet", pixels, [3, 1, 4, 1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    spec = DatasetSpec(str(tmp_path / "repo"), 10, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(CATALOGUE, "cifar10", spec)
    source = select_source("cifar10", "")
    assert source == HubSource("cifar10")
    examples = source.read(32)
    assert examples.labels.tolist() == [3, 1, 4, 1]
    assert np.array_equal(_all(examples), pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("dataset", ["cifar10", "emnist"])
def test_without_a_connection_the_way_out_is_named(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=rf"cannot download {dataset} .*Without a connection set data-dir"
    ):
        HubSource(dataset).read(32)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_emnist_is_turned_upright(tmp_path: Path, suffix: str) -> None:
    upright = random_pixels(3, 28, 28)
    stored = upright.transpose(0, 2, 1)
    labels = np.array([0, 61, 5], dtype=np.uint8)
    write_idx(tmp_path / f"emnist/emnist-byclass-train-images-idx3-ubyte{suffix}", stored)
    write_idx(tmp_path / f"emnist/emnist-byclass-train-labels-idx1-ubyte{suffix}", labels)
    source = select_source("emnist", str(tmp_path))
    assert isinstance(source, IdxSource)
    assert np.array_equal(_all(source.read(28))[:, 0], upright)
    assert source.read(32).labels.tolist() == [0, 61, 5]
    write_parquet(tmp_path / "emnist/train.parquet", stored, labels, columns=("image", "label"))
    source = select_source("emnist", str(tmp_path))
    assert isinstance(source, ParquetSource)
    assert np.array_equal(_all(source.read(28))[:, 0], upright)


def test_idx_file_cut_short(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "x", random_pixels(2, 4, 4))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"not a whole IDX file .*sizes \(2, 4, 4\)"):
        published.read_idx(path, 3)


def test_digits_are_scaled_to_full_range() -> None:
    examples = select_source("digits", "").read(32)
    assert examples.labels.shape == (1797,)
    assert np.bincount(examples.labels).min() == 174
    images = _all(examples)
    assert images.shape == (1797, 1, 32, 32)
    assert images.max() == 255
    assert images.mean() / 255 == pytest.approx(examples.mean[0], abs=5e-4)
    assert images.std() / 255 == pytest.approx(examples.std[0], abs=5e-4)


# a participant's own


def _folder(root: Path, colour: bool = True) -> Path:
    for name in ("cat", "ant"):
        (root / name).mkdir(parents=True)
        for index in range(3):
            shape = (40, 50, 3) if colour else (40, 50)
            Image.fromarray(random_pixels(1, *shape)[0]).save(root / name / f"{index}.png")
    (root / ".hidden").mkdir()
    (root / "cat" / "notes.txt").write_text("not a picture")
    return root


@pytest.mark.parametrize(("colour", "channels"), [(True, 3), (False, 1)])
def test_folder_of_classes(tmp_path: Path, colour: bool, channels: int) -> None:
    examples = select_source("folder", str(_folder(tmp_path, colour))).read(32)
    assert examples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert examples.num_classes == 2
    assert examples.mean == (0.5,) * channels
    assert _all(examples).shape == (6, channels, 32, 32)


def test_folder_fingerprint_follows_its_files(tmp_path: Path) -> None:
    source = FolderSource(_folder(tmp_path))
    before = source.fingerprint()
    assert source.fingerprint() == before
    (tmp_path / "ant" / "0.png").write_bytes(encode(random_pixels(1, 9, 9)[0]))
    assert source.fingerprint() != before


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset = 'folder' needs data-dir"):
        select_source("folder", "")
    with pytest.raises(DataError, match=r"is not a folder\. Give the absolute path"):
        FolderSource(tmp_path / "absent").read(32)
    (tmp_path / "only").mkdir()
    with pytest.raises(DataError, match=r"at least 2 classes, found 1 \(only\)"):
        FolderSource(tmp_path).read(32)
    (tmp_path / "second").mkdir()
    with pytest.raises(DataError, match=r"class folder .*only holds no pictures"):
        FolderSource(tmp_path).read(32)


FUNCTIONS = """
import numpy as np
def grey(): return np.full((4, 10, 10), 9, np.uint8), [0, 1, 2, 2]
def five(): return np.zeros((4, 32, 32, 5), np.uint8), np.arange(4)
def floats(): return np.zeros((4, 32, 32, 3)), np.arange(4)
def flat(): return np.zeros((4, 32), np.uint8), np.arange(4)
def nan(): return np.full((4, 3), np.nan), np.arange(4)
def words(): return np.array([["a"], ["b"]]), np.arange(2)
def odd(): return {"x": 1, "y": 2}
def short(): return np.zeros((4, 32, 32), np.uint8), np.arange(3)
def negative(): return np.zeros((1, 32, 32), np.uint8), np.array([-1])
def raises(): raise OSError("disk not mounted")
def one(): return np.zeros((4, 32, 32), np.uint8)
def channels_first(): return np.zeros((4, 3, 32, 32), np.uint8), np.arange(4)
def none(): return np.zeros((0, 32, 32), np.uint8), np.zeros(0, int)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_data_for_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_data_for_test", raising=False)
    return "own_data_for_test"


def test_own_function(own: str) -> None:
    examples = select_source(f"{own}:grey", "").read(32)
    assert examples.labels.tolist() == [0, 1, 2, 2]
    assert examples.num_classes == 3
    assert np.array_equal(_all(examples), np.full((4, 1, 32, 32), 9))
    assert len(select_source(f"{own}:five", "").read(32).mean) == 5


def test_own_function_fingerprint_follows_code_and_data(own: str, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    source = select_source(f"{own}:grey", str(folder))
    before = source.fingerprint()
    (folder / "new.bin").write_bytes(b"1")
    with_data = source.fingerprint()
    (tmp_path / "own_data_for_test.py").write_text(FUNCTIONS + "\n# changed\n")
    assert before != with_data != source.fingerprint()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", r"float64 \(4, 32, 32, 3\) look like pictures"),
        ("short", r"one for each of the 4 examples, got int64 \(3,\)"),
        ("negative", "a label is -1; classes count from 0"),
        ("raises", "raised OSError: disk not mounted"),
        ("one", "an example of the Dataset is ndarray; it must be a pair"),
        ("odd", r"returned a dict of x, y; expected \(inputs, labels\)"),
        ("flat", r"a table is float32 \(N, columns\)"),
        ("nan", "an input is no finite number"),
        ("words", r"inputs are <U1 \(2, 1\), with 'a' in column 0. Encode words"),
        ("missing", "has nothing under 'missing'"),
        ("channels_first", r"channels come last: np\.moveaxis\(images, 1, -1\)"),
        ("none", r"returned no examples: \(0, 32, 32\)"),
    ],
)
def test_own_function_that_cannot_be_used(own: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        select_source(f"{own}:{name}", "").read(32)
