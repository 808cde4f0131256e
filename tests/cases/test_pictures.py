"""Pictures as they lie on people's disks, and what functions return: read as meant, or refused."""

import io
import json
import logging
import unicodedata
from collections.abc import Callable
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
Mask = np.ndarray
CPU = torch.device("cpu")


def transparent(path: Path, mask: Mask) -> None:
    """Black on transparent: a viewer shows black on white."""
    black = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(np.dstack([black, (mask * 255).astype(np.uint8)]), "RGBA").save(f"{path}.png")


def grey_and_alpha(path: Path, mask: Mask) -> None:
    both = np.dstack([np.zeros((16, 16), np.uint8), (mask * 255).astype(np.uint8)])
    Image.fromarray(both, "LA").save(f"{path}.png")


def plain(path: Path, mask: Mask) -> None:
    Image.fromarray(((1 - mask) * 255).astype(np.uint8)).save(f"{path}.png")


def twelve_bits(path: Path, mask: Mask) -> None:
    Image.fromarray(((1 - mask) * 4095).astype(np.uint16)).save(f"{path}.png")


def float_01(path: Path, mask: Mask) -> None:
    Image.fromarray(((1.0 - mask) * 0.9 + 0.05).astype(np.float32)).save(f"{path}.tif")


def hounsfield(path: Path, mask: Mask) -> None:
    Image.fromarray(((1.0 - mask) * 900 - 1000).astype(np.int32)).save(f"{path}.tif")


KINDS: dict[Callable[[Path, Mask], None], tuple[float, float] | None] = {
    transparent: None,
    grey_and_alpha: None,
    twelve_bits: (0, 4095),
    float_01: (0.05, 0.95),
    hounsfield: (-1000, -100),
}


def glyphs(root: Path, save: Callable[[Path, Mask], None]) -> Path:
    """Two classes of ten pictures each: bars and discs."""
    rng = np.random.default_rng(0)
    rows_, columns = np.mgrid[:16, :16]
    for name in ("bar", "disc"):
        (root / name).mkdir(parents=True)
        for j in range(10):
            x, y = rng.integers(5, 11, 2)
            bar = abs(columns - x) < 2
            save(root / name / f"{j:02}", bar if name == "bar" else
                 (columns - x) ** 2 + (rows_ - y) ** 2 < 15)  # fmt: skip
    return root


def grey(path: Path, value: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


def section(folder: Path, **changes: Any) -> ClientSection:
    base = {
        "dataset": "folder", "data-dir": str(folder), "partition": "none", "image-size": 16,
        "cache-dir": str(folder.parent / "cache"), "validation-fraction": 0.0,
    }  # fmt: skip
    return ClientSection.checked(base | {k.replace("_", "-"): v for k, v in changes.items()}, "x")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_intensity_is_the_same_picture(
    tmp_path: Path, kind: Callable[[Path, Mask], None]
) -> None:
    wanted = open_examples(section(glyphs(tmp_path / "plain", plain)))
    found = open_examples(section(glyphs(tmp_path / "other", kind)))
    assert np.array_equal(found.images.max(1), wanted.images.max(1))
    assert np.array_equal(found.labels, wanted.labels)
    told = found.about.get("intensity")
    assert (told is None) == (KINDS[kind] is None)
    assert told is None or told == pytest.approx(KINDS[kind])


def inverted(path: Path, mask: Mask) -> None:
    plain(path, mask)
    file = path.with_suffix(".png")
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)


def test_inverted_pictures_and_those_with_a_fixed_range_are_the_same(tmp_path: Path) -> None:
    wanted = open_examples(section(glyphs(tmp_path / "plain", plain))).images
    folder = glyphs(tmp_path / "white", inverted)
    assert (open_examples(section(folder)).images != wanted).any()
    turned = open_examples(section(folder, intensity="255..0"))
    assert np.array_equal(turned.images.max(1), wanted.max(1))
    assert turned.about["intensity"] == [255, 0]
    deep = glyphs(tmp_path / "deep", twelve_bits)
    first = min((deep / "bar").iterdir())
    one = np.asarray(Image.open(first)).astype(np.uint16)
    one[0, 0] = 65535  # a label that the scanner burned in
    Image.fromarray(one).save(first)
    squeezed = open_examples(section(deep)).images[1:]
    fixed = open_examples(section(deep, intensity="0..4095"))
    assert squeezed.max() < 20
    assert np.array_equal(fixed.images[1:].max(1), wanted[1:].max(1))
    assert fixed.about["values"] == [0, 65535]


@pytest.mark.parametrize(
    ("kind", "intensity", "words"),
    [
        (plain, "0..4095", r'the pictures have 8 bits, 0 to 255\. Set intensity = "0\.\.255"'),
        (plain, "0..1", r"the pictures have 8 bits"),
        (hounsfield, "0..4095", r'-1000 to -100: they would be all alike\. Set intensity = "-1000'),
    ],
)
def test_a_range_that_is_not_theirs_is_named(
    tmp_path: Path, kind: Callable[[Path, Mask], None], intensity: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        open_examples(section(glyphs(tmp_path / "x", kind), intensity=intensity))


def test_a_range_is_for_pictures_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it is known how those of digits are meant\. Leave it"):
        open_examples(section(tmp_path, dataset="digits", data_dir="", intensity="255..0"))
    with pytest.raises(DataError, match=r"intensity says how pictures .*float32 \(4, 3\)"):
        open_examples(section(tmp_path, dataset=f"{__name__}:table", intensity="0..1"))
    with pytest.raises(DataError, match=r"a picture has a value that is no finite number\. Mend"):
        open_examples(section(tmp_path, dataset=f"{__name__}:holes", intensity="0..1"))
    with pytest.raises(ConfigError, match=r"intensity = '1-2' cannot be used: .*two different"):
        section(tmp_path, intensity="1-2")


def table() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((4, 3), np.float32), np.array([0, 1, 0, 1])


def holes() -> tuple[np.ndarray, np.ndarray]:
    return np.full((4, 8, 8), np.nan), np.array([0, 1, 0, 1])


def test_a_model_reads_new_pictures_as_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inverted ones, from files and from an array of raw values: the same answers."""
    folder = glyphs(tmp_path / "white", inverted)
    node = {
        "client-id": "a", "state-dir": str(tmp_path / "s"), "model": "cnn", "dataset": "folder",
        "data-dir": str(folder), "partition": "none", "intensity": "255..0",
        "cache-dir": str(tmp_path / "cache"),
    }  # fmt: skip
    config = tiny_config(
        tmp_path, num_partitions=1, rounds=1, image_size=32, method="mh-pfedhn", dataset="folder",
        models="cnn", global_model="auto", server_rule="kernel",
    )  # fmt: skip
    run_tiny(config, node_configs=[node])
    files = sorted(folder.glob("*/*.png"))
    raw = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
    labels = np.array([("bar", "disc").index(file.parent.name) for file in files])
    wrong, held = tmp_path / "wrong.npz", tmp_path / "held.npz"
    np.savez(held, inputs=raw, labels=labels)
    np.savez(wrong, inputs=255 - raw, labels=labels)
    tables = []
    for inputs in (folder, held, wrong):
        out = tmp_path / f"{len(tables)}.csv"
        assert main(["model", "predict", str(tmp_path / "s" / "a"), str(inputs), str(out)]) == 0
        lines = out.read_text().splitlines()[1:]
        tables.append([line.split(",")[1:] for line in lines])
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_the_scale_goes_with_the_model(tmp_path: Path) -> None:
    folder = glyphs(tmp_path / "scans", hounsfield)
    config = tiny_config(
        tmp_path, dataset="folder", data_dir=str(folder), partition="none", num_partitions=1,
        models="cnn", rounds=1, image_size=32, state_dir=str(tmp_path / "state"),
    )  # fmt: skip
    run_tiny(config, num_clients=1)
    about = json.loads((tmp_path / "state" / "0" / "personal_model.json").read_text())
    assert about["intensity"] == [-1000, -100]
    assert about["class_names"] == ["bar", "disc"]
    assert "intensity[0] becomes 0" in about["input"]


def test_what_has_no_common_scale_is_refused(tmp_path: Path) -> None:
    mixed = glyphs(tmp_path / "mixed", twelve_bits)
    grey(mixed / "bar" / "eight.png")
    with pytest.raises(DataError, match=r"has more than 8 bits and .*eight\.png has 8"):
        open_examples(section(mixed))
    flat = tmp_path / "flat"
    for name in "ab":
        (flat / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 7, np.int32)).save(flat / name / "x.tif")
    with pytest.raises(DataError, match="every pixel of every picture is 7"):
        open_examples(section(flat))
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(flat / "a" / "y.tif")
    with pytest.raises(DataError, match=r"y.tif has values that are no numbers"):
        open_examples(section(flat))


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
    from experiments.__main__ import main
    from tests.support.tiny import PRESET

    preset = tmp_path / "tiny.toml"
    preset.write_text(PRESET.replace('"cache"', f'"{tmp_path}/cache"'))
    folder = tmp_path / name
    words = ["run", str(preset), "--output-dir", str(folder), "--rounds", "1"]
    assert main(words) == 0
    assert str(folder) in "".join(capsys.readouterr().out.split("\n"))
    assert (folder / "summary.json").is_file()
