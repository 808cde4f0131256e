"""What the values of pictures mean: of any depth, range and direction they are read as one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_app.data.examples import open_examples
from common.errors import ConfigError, DataError
from experiments.__main__ import main
from tests.cases.test_pictures import grey, section
from tests.support.tiny import run_tiny, tiny_config

HERE = __name__
Mask = np.ndarray


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
        open_examples(section(tmp_path, dataset=f"{HERE}:table", intensity="0..1"))
    with pytest.raises(DataError, match=r"a picture has a value that is no finite number\. Mend"):
        open_examples(section(tmp_path, dataset=f"{HERE}:holes", intensity="0..1"))
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
