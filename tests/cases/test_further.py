"""Inputs that people bring beside the known cases: each is right, or a message says what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, random_split

from client_app.data.examples import load_client_data
from client_app.data.own import FolderSource
from common.config import ClientSection
from common.errors import DataError
from experiments.__main__ import main
from tests.support.joining import checked, settings
from tests.support.tiny import run_tiny, tiny_config, trusting

HERE = __name__
N = 60
RNG = np.random.default_rng(0)
TABLE = RNG.normal(0, 1, (N, 4)).astype(np.float32)
CLASSES = np.arange(N) % 3
PIXELS = RNG.integers(0, 256, (N, 12, 12), dtype=np.uint8)


class Examples(Dataset[Any]):
    def __init__(self, example: Callable[[int], Any]) -> None:
        self.example = example

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.example(index)


def frame() -> Any:
    found = pandas.DataFrame(TABLE, columns=list("abcd"))
    found["y"] = CLASSES
    return found[["a", "b", "c", "d"]], found["y"]


def objects() -> Any:
    return TABLE.astype(object), list(CLASSES)


def subsets() -> Any:
    whole = TensorDataset(torch.from_numpy(TABLE), torch.from_numpy(CLASSES))
    train, test = random_split(whole, [40, 20])
    return {"train": train, "test": test}


def dated() -> Any:
    days = pandas.date_range("2024-01-01", periods=N, tz="Europe/Berlin")
    return {"inputs": TABLE, "labels": CLASSES, "times": days}


def iso_dated() -> Any:
    days = [f"2024-03-{1 + n % 28:02d}" for n in range(N)]
    return {"inputs": TABLE, "labels": CLASSES, "times": days}


@pytest.mark.parametrize("source", [frame, objects, subsets, dated, iso_dated])
def test_tables_as_they_lie_about_are_read(source: Callable[[], Any], tmp_path: Path) -> None:
    config = {"dataset": f"{HERE}:{source.__name__}", "partition": "none"}
    section = ClientSection.checked({**config, "cache-dir": str(tmp_path)}, "x")
    data = load_client_data(section, partition_id=0, seed=0, device=torch.device("cpu"))
    assert (data.input_shape, data.target, data.num_classes) == ((4,), "classes", 3)
    assert data.num_train >= 36


def words() -> Any:
    return np.array([["1.5", "m"]] * N, dtype=object), CLASSES


def named_classes() -> Any:
    return TABLE, np.array(["benign", "malign"] * (N // 2))


def column_of_classes() -> Any:
    return TABLE, CLASSES[:, None]


def unsure() -> Any:
    return TABLE, RNG.integers(-1, 2, (N, 5))


def one_hot() -> Any:
    return TABLE, pandas.get_dummies(CLASSES)


def dicts() -> Any:
    return Examples(lambda n: {"image": TABLE[n], "label": 0})


def triples() -> Any:
    return Examples(lambda n: (TABLE[n], 0, n))


def unnamed_inputs() -> Any:
    return Examples(lambda n: ((PIXELS[n], TABLE[n]), 0))


def list_of_pairs() -> Any:
    return [(x, 0) for x in TABLE]


def volumes() -> Any:
    return RNG.integers(0, 256, (N, 8, 16, 16), dtype=np.uint8), CLASSES


def microscopy() -> Any:
    return RNG.integers(0, 256, (N, 5, 24, 24), dtype=np.uint8), CLASSES


def tomography() -> Any:
    return RNG.integers(-1000, 1000, (N, 16, 16)).astype(np.int16), CLASSES


def breaks() -> Any:
    return TABLE, {}["label"]


WRONG: list[tuple[Callable[[], Any], str]] = [
    (words, "with '1.5' in column 0. Encode words as numbers"),
    (named_classes, "labels are texts, benign, malign. Number them: np.unique"),
    (column_of_classes, "with 2. One class an example: labels.ravel()"),
    (unsure, "with -1. One class"),
    (one_hot, "have a single 1 in every row. Are they a class each? labels.argmax(1)"),
    (dicts, "is a dict of image, label; it must be a pair: return (example['image']"),
    (triples, "an example of the Dataset is 3 entries; it must be a pair"),
    (unnamed_inputs, "has 2 parts without names; name them"),
    (list_of_pairs, "a list of pairs; return them as two: tuple(zip(*pairs))"),
    (volumes, "Volumes, and pictures of more channels, are floats"),
    (microscopy, "channels come last"),
    (tomography, "(N, T) from 0. Pictures are uint8, or have an intensity"),
    (breaks, "raised KeyError: 'label' (line test_further.py:"),
]


@pytest.mark.parametrize(("source", "words"), WRONG, ids=[s.__name__ for s, _ in WRONG])
def test_what_cannot_be_read_says_what_to_do(
    source: Callable[[], Any], words: str, tmp_path: Path
) -> None:
    config = {"dataset": f"{HERE}:{source.__name__}", "partition": "none"}
    section = ClientSection.checked({**config, "cache-dir": str(tmp_path)}, "x")
    with pytest.raises(DataError, match=re.escape(words)):
        load_client_data(section, partition_id=0, seed=0, device=torch.device("cpu"))


# --- folders --------------------------------------------------------------------------------------


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[0]).save(path)
    return path


@pytest.mark.parametrize("other", ["val", "extra"])
def test_parts_are_never_taken_for_classes(tmp_path: Path, other: str) -> None:
    for part in ("train", other, *(["test"] if other == "extra" else [])):
        for name in ("benign", "malign"):
            picture(tmp_path / part / name / "1.png")
    with pytest.raises(DataError, match=r"with train there must be test .* and nothing else"):
        FolderSource(tmp_path).pictures()


def test_links_are_followed_and_broken_ones_are_counted(tmp_path: Path) -> None:
    kept = tmp_path / "archive" / "patient"
    picture(kept / "1.png")
    (kept / "again").symlink_to(kept)
    for name in ("a", "b"):
        picture(tmp_path / "data" / name / "own.png")
        (tmp_path / "data" / name / "patient").symlink_to(kept)
        (tmp_path / "data" / name / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = FolderSource(tmp_path / "data")
    assert [len(members) for members in source.pictures().values()] == [2, 2]
    assert source.read(8).about["left_out"] == {"links that lead nowhere": 2}


def test_pages_of_a_tiff_are_not_lost_unsaid(tmp_path: Path) -> None:
    pages = [Image.fromarray(page) for page in PIXELS[:3]]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages[0].save(tmp_path / name / "1.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="a TIFF has 3 pages, of which one would be read"):
        FolderSource(tmp_path).read(8)


# --- models ---------------------------------------------------------------------------------------


def table() -> Any:
    return TABLE, CLASSES


class Remembering(nn.Module):
    """Adds up what it sees: in an attribute, in a buffer that is not there yet, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.how, self.seen = how, torch.zeros(4)
        if how == "none yet":
            self.register_buffer("mean", None)

    def forward(self, rows: Tensor) -> Tensor:
        if self.how == "attribute":
            self.seen = 0.5 * self.seen + rows.mean(0).detach()
            rows = rows + self.seen
        elif self.how == "graph":
            self.seen = 0.5 * self.seen + rows.mean(0) * self.head.weight[0]
            rows = rows + self.seen
        elif self.how == "made":
            self.register_buffer("cache", torch.ones(4))
        elif self.how == "none yet":
            self.mean = rows.mean(0).detach()
        elif self.how == "batch size":
            rows = rows + torch.zeros(int(rows.shape[0]), 4)
            rows = rows.view(int(str(len(rows))), 4)
        return self.head(rows)


def attribute(*, in_channels: int, num_classes: int) -> nn.Module:
    return Remembering("attribute")


def graph(*, in_channels: int, num_classes: int) -> nn.Module:
    return Remembering("graph")


def made(*, in_channels: int, num_classes: int) -> nn.Module:
    return Remembering("made")


def none_yet(*, in_channels: int, num_classes: int) -> nn.Module:
    return Remembering("none yet")


def by_batch(*, in_channels: int, num_classes: int) -> nn.Module:
    return Remembering("batch size")


ONE = nn.Linear(4, 3)


def the_same(*, in_channels: int, num_classes: int) -> nn.Module:
    return ONE


@pytest.mark.parametrize(
    ("model", "good", "words"),
    [
        ("attribute", True, "keeps something that is neither parameter nor buffer"),
        ("graph", False, "Does it keep a state of the batch before? Make it anew in forward."),
        ("made", False, "makes or resizes the buffer cache in forward. Register it in __init__"),
        ("none_yet", False, "makes or resizes the buffer mean in forward"),
        ("the_same", False, "returned the same parameters as in an earlier call"),
    ],
)
def test_the_check_finds_what_a_model_keeps(
    model: str, good: bool, words: str, tmp_path: Path
) -> None:
    values = {"model": f"{HERE}:{model}", "dataset": f"{HERE}:table", "partition": "none"}
    passed, text = checked(settings(tmp_path, **values, **{"cache-dir": str(tmp_path / "c")}))
    assert passed == good, text
    assert words in text


def test_a_model_that_is_no_program_is_exported_as_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trusting(tmp_path, f"{HERE}:by_batch") | {"dataset": f"{HERE}:table"}
    node = {"client-id": "a", "state-dir": str(tmp_path / "s"), "partition": "none", **own}
    config = tiny_config(tmp_path, rounds=1, server_rule="kernel")
    run_tiny(config, node_configs=[node])
    assert main(["model", "export", str(tmp_path / "s" / "a"), str(tmp_path / "out")]) == 0
    assert "weights only, without the program" in capsys.readouterr().out
    assert (tmp_path / "out" / "personal_model.safetensors").exists()
    assert not (tmp_path / "out" / "personal_model.pt2").exists()
