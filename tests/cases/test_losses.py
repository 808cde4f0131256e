"""Losses of participants' own: descended, weighed by class, or refused with what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client_app.data.losses import own_loss
from client_app.data.several import packed
from client_app.personal import read_predictor
from client_app.shelf import LAST, Shelf
from common.errors import ConfigError, RunError
from tests.support import targets
from tests.support.joining import checked, settings
from tests.support.outputs import rows
from tests.support.targets import KINDS, federation, visits
from tests.support.tiny import run_tiny, trusting

HERE = __name__
VISITS = {"model": f"{targets.HERE}:joint", "dataset": f"{targets.HERE}:visits"}


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    likely = torch.softmax(outputs, 1).gather(1, labels[:, None])[:, 0]
    return -((1 - likely) ** 2) * likely.log()


def averaged(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


@pytest.mark.parametrize(("kind", "loss"), [("numbers", "absolute"), ("classes", f"{HERE}:focal")])
def test_a_loss_of_ones_own_is_descended(kind: str, loss: str, tmp_path: Path) -> None:
    found = []
    for name in ("", loss):
        config = federation(tmp_path / str(len(found)), kind, loss=name, method="local")
        run_tiny(config)
        found.append(rows(config)[-1])
    assert found[1]["accuracy_micro"] > KINDS[kind][2] - 0.1
    assert found[0]["train_loss"] != found[1]["train_loss"]


def test_balanced_classes_weigh_alike() -> None:
    labels = torch.tensor([0] * 9 + [2] * 3)
    outputs = torch.randn(12, 3)
    each = own_loss("balanced", labels, "classes", 3)(outputs, labels)
    plain = nn.functional.cross_entropy(outputs, labels, reduction="none")
    torch.testing.assert_close(each.mean(), (plain[:9].mean() + plain[9:].mean()) / 2)


def test_given_weights_count_by_how_they_compare() -> None:
    labels, outputs = torch.tensor([0] * 9 + [2] * 3), torch.randn(12, 3)
    plain = nn.functional.cross_entropy(outputs, labels, reduction="none")
    wanted = (plain[:9].sum() + 6 * plain[9:].sum()) / (9 * 1 + 3 * 6)
    for text in ("1, 4, 6", "0.5,2,3"):
        each = own_loss(text, labels, "classes", 3)(outputs, labels)
        torch.testing.assert_close(each.mean(), wanted)
    balanced = own_loss("balanced", labels, "classes", 3)(outputs, labels)
    torch.testing.assert_close(own_loss("3, 1, 9", labels, "classes", 3)(outputs, labels), balanced)
    only = own_loss("0, 0, 1", labels, "classes", 3)(outputs, labels)
    torch.testing.assert_close(only, torch.cat([torch.zeros(9), 4 * plain[9:]]))


def test_a_class_that_weighs_more_is_found_more_often(tmp_path: Path) -> None:
    """Also by the model trained alone, and where a participant's own file says it."""
    found = {}
    for loss in ("", "1, 30, 1, 1"):
        node = {"client-id": "a", "state-dir": str(tmp_path / f"s{loss}"), "loss": loss}
        node |= trusting(tmp_path) | VISITS | {"partition": "none", "global-model": "auto"}
        config = federation(tmp_path / f"{loss}r", "classes", num_partitions=1, rounds=1,
                            local_epochs=1, method="mh-pfedhn", server_rule="kernel")  # fmt: skip
        run_tiny(config, node_configs=[node])
        module, _ = read_predictor(Shelf(tmp_path / f"s{loss}" / "a").find(LAST).folder)
        row = torch.from_numpy(packed(visits()["inputs"])[0])
        found[loss] = int((module(row).argmax(1) == 1).sum()), rows(config)[-1]
    assert found["1, 30, 1, 1"][0] > found[""][0]
    alone = [row["accuracy_alone"] for _, row in found.values()]
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("classes", {"loss": "1, 5"}, r"'1, 5' has 2 weights, and there are 4 classes. Give one"),
        ("classes", {"loss": "5"}, r"has 1 weights, and there are 4 classes"),
        ("classes", {"loss": "1, -5, 1, 1"}, r"'-5' is no weight of a class; expected numbers"),
        ("classes", {"loss": "1, nan, 1, 1"}, r"'nan' is no weight of a class"),
        ("classes", {"loss": "1, inf, 1, 1"}, r"'inf' is no weight of a class"),
        ("classes", {"loss": "1, , 1, 1"}, r"'' is no weight of a class"),
        ("classes", {"loss": "0, 0, 0, 0"}, r"weighs 0, and nothing would be learned"),
        ("numbers", {"loss": "1, 5"}, r"'1, 5' is for classes; here are numbers"),
        ("classes", {"loss": "1;2;3;4"}, r"or a weight for each class: '1, 5'"),
        ("classes", {"loss": "absolute"}, "'absolute' is for numbers; here are classes"),
        ("classes", {"loss": "balance"}, "balanced"),
        ("classes", {"loss": "balanced", "dp_noise": 1.0, "method": "local"}, "may be made of all"),
    ],
)
def test_a_loss_that_cannot_be_says_so(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises((RunError, ConfigError), match=words):
        run_tiny(federation(tmp_path, kind, **changes))


def test_the_check_says_what_each_class_weighs(tmp_path: Path) -> None:
    values = VISITS | {"loss": "1, 3, 1, 1", "cache-dir": str(tmp_path / "cache")}
    good, text = checked(settings(tmp_path, **values))
    assert good, text
    found = re.search(r"where weigh 0 ([0-9.]+), 1 ([0-9.]+), 2 ([0-9.]+)", " ".join(text.split()))
    assert found, text
    first, second, third = map(float, found.groups())
    assert (second, third) == (pytest.approx(3 * first, rel=0.01), first)


def test_the_check_finds_a_loss_that_is_a_mean(tmp_path: Path) -> None:
    values = VISITS | {"loss": f"{HERE}:averaged", "cache-dir": str(tmp_path / "cache")}
    good, text = checked(settings(tmp_path, **values))
    assert not good
    assert "got shape (). Leave out the mean" in " ".join(text.split())
