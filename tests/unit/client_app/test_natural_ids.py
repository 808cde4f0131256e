"""Data that say who an example is of: writers, hospitals, cameras, people; a client is one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from client_app.data.examples import ClientData, load_client_data
from client_app.data.select import select_source
from client_app.data.splits import split_natural
from common.config import ClientSection
from common.errors import ConfigError, DataError
from tests.unit.client_app.pictures import encode, random_pixels


def _table(path: Path, pixels: NDArray[np.uint8], **columns: list[object]) -> None:
    pictures = [{"bytes": encode(picture), "path": None} for picture in pixels]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pictures, **columns}), path)


def _write_femnist(root: Path) -> list[str]:
    """Five writers of 1, 8, 12, 6 and 20 characters, in mixed order; the columns of flwrlabs."""
    writers = [f"f{i:04}_{i}" for i, n in enumerate((1, 8, 12, 6, 20)) for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(writers))
    writers = [writers[i] for i in order]
    _table(
        root / "femnist/data/train-00000-of-00001.parquet",
        random_pixels(len(writers), 28, 28),
        writer_id=writers,
        hsf_id=[0] * len(writers),
        character=[i % 62 for i in range(len(writers))],
    )
    return writers


def _write_camelyon(root: Path) -> list[int]:
    centers = []
    for split, names in (("train", [0, 3, 4]), ("validation", [1]), ("test", [2])):
        column = names * 6
        _table(
            root / f"camelyon17/data/{split}-00000-of-00001.parquet",
            random_pixels(len(column), 96, 96, 3),
            label=[i % 2 for i in range(len(column))],
            center=column,
            patient=[7] * len(column),
        )
        centers += column
    return centers


def _write_iwildcam(root: Path) -> list[int]:
    folder = root / "train"
    folder.mkdir(parents=True)
    lines, traps = ["split,location_remapped,y,filename"], []
    for index in range(18):
        name, trap = f"{index:03}.jpg", (5, 40, 7)[index % 3]
        lines.append(f"train,{trap},{index * 10},{name}")
        if index != 4:  # a picture that was not unpacked
            Image.fromarray(random_pixels(1, 30, 40, 3)[0]).save(folder / name)
            traps.append(trap)
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return traps


def _write_har(root: Path) -> list[int]:
    rng, people = np.random.default_rng(1), []
    for half, who in (("train", [1, 3, 5]), ("test", [2, 4])):
        (root / half).mkdir(parents=True)
        column = sorted(who * 7)
        np.savetxt(root / half / f"X_{half}.txt", rng.normal(size=(len(column), 561)), "%.7e")
        np.savetxt(root / half / f"y_{half}.txt", rng.integers(1, 7, len(column)), "%d")
        np.savetxt(root / half / f"subject_{half}.txt", column, "%d")
        people += column
    return people


FORMS = {
    "femnist": (_write_femnist, 4, 32),
    "camelyon17": (_write_camelyon, 5, 96),
    "iwildcam": (_write_iwildcam, 3, 32),
    "har": (_write_har, 5, 32),
}
"""Of each: who writes it in its form, how many groups have two examples, the size of pictures."""


def _client(section: ClientSection, partition_id: int) -> ClientData:
    return load_client_data(section, partition_id=partition_id, seed=3, device=torch.device("cpu"))


def _rows(data: ClientData) -> int:
    return data.num_train + data.num_test + len(data.validation_labels)


@pytest.mark.parametrize("name", FORMS)
def test_a_client_is_one_writer_hospital_camera_or_person(name: str, tmp_path: Path) -> None:
    write, count, size = FORMS[name]
    ids = np.array(write(tmp_path / "data"))
    section = ClientSection(
        dataset=name,
        data_dir=str(tmp_path / "data"),
        cache_dir=str(tmp_path / "cache"),
        partition="natural-id",
        num_partitions=count,
        image_size=size,
    )
    sizes = sorted(n for n in np.unique(ids, return_counts=True)[1] if n > 1)
    clients = [_client(section, partition_id) for partition_id in range(count)]
    assert sorted(map(_rows, clients)) == sizes
    for data in clients:
        tested = set(ids[data.test_rows].tolist())
        assert len(tested) == 1
        assert min(data.num_train, data.num_test) > 0
    held = [set(ids[data.test_rows].tolist()).pop() for data in clients]
    assert len(set(held)) == count
    if name == "har":
        assert (clients[0].input_shape, clients[0].is_pictures) == ((561,), False)
        assert int(torch.cat([c.train_labels for c in clients]).max()) <= 5
    with pytest.raises(DataError, match=f"the data has {count} of them .* Use at most {count} cl"):
        _client(section.model_copy(update={"num_partitions": count + 1}), 0)


def test_of_more_groups_than_clients_the_seed_draws_some() -> None:
    groups = np.repeat(np.arange(50), 4)[np.random.default_rng(0).permutation(200)]
    drawn = [
        split_natural(groups, num_clients=6, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    for parts in drawn:
        assert [len(part) for part in parts] == [4] * 6
        assert all(len(set(groups[part])) == 1 for part in parts)
    names = [[int(groups[part[0]]) for part in parts] for parts in drawn]
    assert names[0] == names[1] != names[2]


def test_a_published_set_divided_otherwise_is_tested_on_all_its_writers(tmp_path: Path) -> None:
    writers = np.array(_write_femnist(tmp_path))
    section = ClientSection(
        dataset="femnist",
        data_dir=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        partition="none",
    )
    data = _client(section, 0)
    assert set(writers[data.test_rows]) & set(np.delete(writers, data.test_rows))


def test_the_groups_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wards.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    rows = np.arange(24)\n"
        "    inputs = np.stack([rows, rows], 1).astype('float32')\n"
        "    wards = [f'ward-{row % 4}' for row in rows]\n"
        "    return {'inputs': inputs, 'labels': rows % 2, 'groups': wards}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wards", raising=False)
    section = ClientSection(
        dataset="wards:load",
        cache_dir=str(tmp_path / "cache"),
        partition="natural-id",
        num_partitions=4,
    )
    for partition_id in range(4):
        data = _client(section, partition_id)
        assert {int(row) % 4 for row in data.train_images[:, 0]} == {partition_id}
    alone = section.model_copy(update={"partition": "linear", "num_partitions": 2})
    assert _rows(_client(alone, 0)) < 24  # divided otherwise, wards are held back whole
    tested = {int(row) % 4 for row in _client(alone, 1).test_images[:, 0]}
    assert not tested & {int(row) % 4 for row in _client(alone, 1).train_images[:, 0]}


def test_data_without_groups_say_so(tmp_path: Path) -> None:
    section = ClientSection(
        dataset="digits", cache_dir=str(tmp_path), partition="natural-id", num_partitions=4
    )
    with pytest.raises(DataError, match="digits names none"):
        _client(section, 0)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("iwildcam", lambda root: (root / "metadata.csv").unlink(), "metadata.csv: expected"),
        (
            "iwildcam",
            lambda root: (root / "metadata.csv").write_text("filename,y\n"),
            "lacks the columns location_remapped",
        ),
        ("har", lambda root: (root / "test/y_test.txt").unlink(), "has no .*y_test.txt: expected"),
        ("har", lambda root: (root / "test/y_test.txt").write_text("1\n"), "got .*22 and 35"),
        ("har", lambda root: (root / "train/X_train.txt").write_text("a b\n"), "cannot read .*X_t"),
    ],
)
def test_what_lacks_is_named(name: str, spoil: object, message: str, tmp_path: Path) -> None:
    FORMS[name][0](tmp_path / "data")
    spoil(tmp_path / "data")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        select_source(name, str(tmp_path / "data")).read(32)
    with pytest.raises(ConfigError, match="is not on the hub: it needs data-dir"):
        select_source(name, "")
