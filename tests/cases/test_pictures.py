"""Pictures as they lie on people's disks, and what functions return: read as meant, or refused."""

import io
import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from client_app.data.examples import load_client_data, open_examples
from client_app.data.prepare import prepare_data
from common.config import ClientSection
from common.errors import ConfigError, DataError
from experiments.__main__ import main
from experiments.run.presets import Preset, read_toml
from tests.support.joining import checked, settings
from tests.support.outputs import rows
from tests.support.tiny import run_tiny, tiny_config

HERE = __name__
CPU = torch.device("cpu")


def grey(path: Path, value: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


def section(folder: Path, **changes: Any) -> ClientSection:
    base = {
        "dataset": "folder", "data-dir": str(folder), "partition": "none", "image-size": 16,
        "cache-dir": str(folder.parent / "cache"), "validation-fraction": 0.0,
    }  # fmt: skip
    return ClientSection.checked(base | {k.replace("_", "-"): v for k, v in changes.items()}, "x")


def test_what_systems_and_appliances_write_is_left_out(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for j in range(2):
            grey(tmp_path / "d" / name / f"{j}.png", 10 + j)
    for junk in (".ipynb_checkpoints/0.png", ".Trash-0/files/old.png", "deep/@eaDir/1.png",
                 "__MACOSX/._0.png", ".hidden.png"):  # fmt: skip
        grey(tmp_path / "d" / "cat" / junk, 99)
    for folder in ("@eaDir", "__MACOSX", ".git"):
        grey(tmp_path / "d" / folder / "x.png", 99)
    found = open_examples(section(tmp_path / "d"))
    assert found.about["class_names"] == ["cat", "dog"]
    assert sorted(found.images[:, 0, 0, 0].tolist()) == [10, 10, 11, 11]


def test_what_is_no_picture_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        for j in range(4):
            grey(tmp_path / "d" / name / f"{j}.png", 10 + 50 * j)
    Image.new("L", (8, 8), 3).save(tmp_path / "d" / "cat" / "x.jfif", "JPEG")
    for j in range(5):
        (tmp_path / "d" / "cat" / f"i{j}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "d" / "dog" / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        found = open_examples(section(tmp_path / "d"))
    assert len(found.labels) == 9, "the .jfif is read"
    assert "they are no pictures: 5 .heic, 1 .txt" in caplog.text
    own = {"dataset": "folder", "data-dir": str(tmp_path / "d"), "model": "cnn"}
    _, text = checked(settings(tmp_path, **own, **{"validation-fraction": 0.0}))
    assert "cat 4, dog 3 to train" in " ".join(text.split())
    assert "5 .heic, 1 .txt" in text
    assert "of 255" in text


def test_a_site_may_lack_classes_that_others_have(tmp_path: Path) -> None:
    for site, names in {"a": ("bird", "cat", "dog"), "b": ("cat", "dog")}.items():
        for name in names:
            for j in range(3):
                grey(tmp_path / site / name / f"{j}.png", 60 * ["bird", "cat", "dog"].index(name))
    (tmp_path / "b" / "bird").mkdir()
    with pytest.raises(DataError, match=r"holds no pictures .*or set class-names"):
        open_examples(section(tmp_path / "b"))
    all_names = "dog, bird, cat"
    for site in "ab":
        found = open_examples(section(tmp_path / site, class_names=all_names))
        assert found.num_classes == 3
        assert found.about["class_names"] == ["dog", "bird", "cat"]
        shades = {0: 120, 1: 0, 2: 60}
        assert [shades[label] for label in found.labels] == found.images[:, 0, 0, 0].tolist()
    data = load_client_data(
        section(tmp_path / "b", class_names=all_names), partition_id=0, seed=1, device=CPU
    )
    assert (data.num_classes, sorted(set(data.train_labels.tolist()))) == (3, [0, 2])
    with pytest.raises(DataError, match="bird is no class of this federation, whose class-names"):
        open_examples(section(tmp_path / "a", class_names="dog,cat"))
    with pytest.raises(ConfigError, match="must be two or more different names"):
        section(tmp_path / "a", class_names="dog,dog")


def test_two_sites_of_different_classes_learn_together(tmp_path: Path) -> None:
    for site, names in {"a": ("bird", "cat"), "b": ("cat", "dog")}.items():
        for name in names:
            for j in range(12):
                grey(tmp_path / site / name / f"{j}.png", 100 * ["bird", "cat", "dog"].index(name))
    nodes = [
        {"client-id": site, "dataset": "folder", "data-dir": str(tmp_path / site), "model": "mlp",
         "cache-dir": str(tmp_path / "cache")}
        for site in "ab"
    ]  # fmt: skip
    config = tiny_config(
        tmp_path, class_names="bird,cat,dog", method="mh-pfedhn-gd", global_model="mlp", rounds=3,
        models="mlp", image_size=32, dataset="folder",
    )  # fmt: skip
    run_tiny(config, node_configs=nodes)
    assert [row["num_accepted"] for row in rows(config)] == [2, 2, 2]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_whatever_their_form(tmp_path: Path, form: str) -> None:
    names = ["zèbre", "école", "fille", "eta"]
    for j, name in enumerate(names):
        grey(tmp_path / "d" / unicodedata.normalize(form, name) / "0.png", 10 * j)
    found = open_examples(section(tmp_path / "d"))
    assert found.about["class_names"] == ["eta", "fille", "zèbre", "école"]
    assert found.images[:, 0, 0, 0].tolist() == [30, 20, 0, 10]


def test_one_name_in_two_forms_is_refused(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        grey(tmp_path / "d" / unicodedata.normalize(form, "école") / "0.png")
    with pytest.raises(DataError, match="two folders whose names look alike"):
        open_examples(section(tmp_path / "d"))


@pytest.mark.parametrize("partition", ["iid", "size", "linear", "square", "exponential"])
def test_a_partition_by_order_is_not_one_by_class(tmp_path: Path, partition: str) -> None:
    for name in ("a", "b"):
        for j in range(60):
            grey(tmp_path / "d" / name / f"{j:02}.png", j)
    options = '{"partition_sizes": [60, 60]}' if partition == "size" else "{}"
    shares = section(
        tmp_path / "d", partition=partition, num_partitions=2, partition_options=options
    )
    for client in range(2):
        data = load_client_data(shares, partition_id=client, seed=1, device=CPU)
        assert set(data.train_labels.tolist()) == {0, 1}


VALUE = {"images": np.zeros((8, 4, 4), np.uint8)}


def from_a_value() -> tuple[Any, Any]:
    return VALUE["images"], np.arange(8) % 2


def test_a_function_is_asked_anew_when_a_run_starts(tmp_path: Path) -> None:
    """It may read a file that nobody named."""
    own = section(tmp_path / "none", dataset=f"{HERE}:from_a_value", data_dir="", image_size=8)
    prepare_data(own, seed=1)
    assert open_examples(own).images.max() == 0
    VALUE["images"] = np.full((8, 4, 4), 200, np.uint8)
    assert open_examples(own).images.max() == 0  # within a run it stays
    prepare_data(own, seed=1)
    assert load_client_data(own, partition_id=0, seed=1, device=CPU).train_images.max() == 200
    VALUE["images"] = np.zeros((8, 4, 4), np.uint8)


def several_sizes() -> tuple[Any, Any]:
    return [np.zeros((8, 8), np.uint8), np.zeros((9, 8), np.uint8)] * 2, np.arange(4) % 2


def alike() -> tuple[Any, Any]:
    return [np.zeros((8, 8), np.uint8)] * 4, [0, 1, 0, 1]


def test_pictures_of_several_sizes_are_named(tmp_path: Path) -> None:
    own = section(tmp_path / "x", dataset=f"{HERE}:several_sizes", data_dir="")
    with pytest.raises(DataError, match=r"2 sizes, \(8, 8\), \(9, 8\)\. Resize pictures to one"):
        open_examples(own)
    same = own.model_copy(update={"dataset": f"{HERE}:alike"})
    assert len(open_examples(same).labels) == 4


def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    own = section(tmp_path / "x", dataset=f"{HERE}:alike", data_dir="", class_names="a,b,c")
    assert open_examples(own).num_classes == 3
    few = section(tmp_path / "x", dataset=f"{HERE}:three", data_dir="", class_names="a,b")
    with pytest.raises(DataError, match="a label is 2, but class-names has 2 names"):
        open_examples(few)


def three() -> tuple[Any, Any]:
    return np.zeros((6, 8, 8), np.uint8), np.arange(6) % 3


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def test_tables_of_plain_bytes_are_read_and_others_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    pictures = [encoded(10 * i) for i in range(20)]
    labels = list(range(10)) * 2
    own = section(tmp_path, dataset="cifar10", image_size=32)
    pq.write_table(
        pa.table({"img": pa.array(pictures, pa.binary()), "label": labels}),
        folder / "train.parquet",
    )
    assert open_examples(own).images[:, 0, 0, 0].tolist() == [10 * i for i in range(20)]
    lists = pa.array([list(b) for b in pictures], pa.list_(pa.uint8()))
    pq.write_table(pa.table({"img": lists, "label": labels}), folder / "train.parquet")
    with pytest.raises(DataError, match=r"img is list<.*uint8>; expected encoded pictures"):
        open_examples(own)


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = (
        'description = "x"\n[engine]\nname = "inprocess"\nnum-clients = 2\n[config]\nrounds = 1\n'
    )
    file = tmp_path / "x.toml"
    file.write_text(text, encoding="utf-8-sig")
    assert read_toml(file)["description"] == "x"
    assert Preset.load(str(file)).config.run.rounds == 1


@pytest.mark.parametrize("name", ["a [b]", "a[/b]"])
def test_brackets_in_a_path_are_printed_as_they_stand(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support.tiny import PRESET

    preset = tmp_path / "tiny.toml"
    preset.write_text(PRESET.replace('"cache"', f'"{tmp_path}/cache"'))
    folder = tmp_path / name
    words = ["run", str(preset), "--output-dir", str(folder), "--rounds", "1"]
    assert main(words) == 0
    assert str(folder) in "".join(capsys.readouterr().out.split("\n"))
    assert (folder / "summary.json").is_file()
