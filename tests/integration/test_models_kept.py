"""A participant's models: kept from the first round on, through crashes and later runs."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from flwr.app import Context, Message
from PIL import Image

from client_app.personal import read_predictor
from client_app.shelf import BEST, LAST, MOST_FEDERATIONS, Shelf
from common.config import RunConfig
from common.errors import DataError, RunError
from experiments.__main__ import main
from tests.support import tiny
from tests.support.outputs import rows as rows_of
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config, trusting

Capture = pytest.CaptureFixture[str]


def node(folder: Path, **own: Any) -> dict[str, Any]:
    return {
        "client-id": "a", "partition-id": 0, "state-dir": str(folder / "state"),
        **trusting(folder, f"{HERE}:small"), **own,
    }  # fmt: skip


def config_at(folder: Path, **settings: Any) -> RunConfig:
    wanted = {"server_rule": "kernel", "validation_fraction": 0.1, "measure_alone": True}
    return tiny_config(folder, **{**wanted, "rounds": 4, "evaluate_every": 4, **settings})


def shelf(folder: Path) -> Shelf:
    return Shelf(folder / "state" / "a")


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd", "mh-pfedhn-pg", "fedavg", "local"])
def test_there_is_a_model_in_every_round(tmp_path: Path, method: str) -> None:
    seen = []

    def look(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type.startswith("train"):
            found = shelf(tmp_path).find(LAST) if shelf(tmp_path).federations() else None
            seen.append(found and found.server_round)
        return reply

    config = config_at(tmp_path, method=method)
    run_tiny(config, app=Wrapped(look), node_configs=[node(tmp_path)])
    rounds = [r for r in seen if r is not None]
    assert sorted(set(rounds)) == [1, 2, 3, 4]
    found = shelf(tmp_path).find(LAST)
    assert {"validation_accuracy", "test_accuracy", "federation", "round"} <= found.about.keys()
    assert (found.folder / "personal_model.pt2").is_file(), "of the last round there is a program"
    assert found.folder.stat().st_mode & 0o077 == 0
    versions = shelf(tmp_path).versions(shelf(tmp_path).federations()[0])
    assert len(versions) <= 2
    assert shelf(tmp_path).find(BEST).quality == max(v.quality for v in versions)


def test_what_is_read_back_is_the_model_that_was_tested(tmp_path: Path) -> None:
    for method in ("mh-pfedhn", "mh-pfedhn-pg"):
        place = tmp_path / method
        run_tiny(config_at(place, method=method), node_configs=[node(place)])
        found = shelf(place).find(LAST)
        module, about = read_predictor(found.folder)
        images, labels = tiny.patterns()
        rows = np.load(found.folder / "test_rows.npy")
        logits = module(torch.from_numpy(images[rows])[:, None])
        assert int((logits.argmax(1).numpy() == labels[rows]).sum()) == about["num_correct"]


def test_the_best_is_by_validation_and_stays(tmp_path: Path) -> None:
    """One of an earlier round, where later ones are worse."""

    def spoil(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type != "query.register":
            config = message.content["config"]
            if int(config["server-round"]) > 2 and "theta" in message.content["arrays"]:
                theta = message.content["arrays"]["theta"].numpy()
                message.content["arrays"]["theta"] = type(message.content["arrays"]["theta"])(
                    np.zeros_like(theta) - 5
                )
        return handler(message, context)

    config = config_at(tmp_path, method="mh-pfedhn", learning_rate=0.3)
    run_tiny(config, app=Wrapped(spoil), node_configs=[node(tmp_path)])
    last, best = (shelf(tmp_path).find(which) for which in (LAST, BEST))
    assert (last.server_round, best.server_round) == (4, 2)
    assert best.about["validation_accuracy"] > last.about["validation_accuracy"]


def test_a_later_run_and_a_left_federation_lose_none(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_tiny(config_at(tmp_path / name, rounds=2), node_configs=[node(tmp_path)])
    assert len(shelf(tmp_path).federations()) == 2
    assert all(shelf(tmp_path).versions(name) for name in shelf(tmp_path).federations())


def test_a_stop_in_the_middle_leaves_a_whole_model(tmp_path: Path) -> None:
    def stop(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.content["config"]["server-round"] == 3:
            raise KeyboardInterrupt
        return reply

    config = config_at(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(config, app=Wrapped(stop), node_configs=[node(tmp_path)])
    found = shelf(tmp_path).find(LAST)
    assert found.server_round == 3
    assert read_predictor(found.folder)[1]["round"] == 3
    half = found.folder.parent / ".draft"
    half.mkdir()
    (half / "personal_model.json").write_text("{}")  # as a kill -9 leaves it
    assert shelf(tmp_path).find(LAST) == found


def test_a_disk_that_cannot_be_written_costs_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state" / "a").mkdir(parents=True)
    (tmp_path / "state" / "a" / "models").write_text("no folder")
    config = config_at(tmp_path, rounds=2)
    run_tiny(config, node_configs=[node(tmp_path)])
    assert [row["num_accepted"] for row in rows_of(config)] == [1, 1]
    assert "the model of round 1 is not kept" in caplog.text


def test_a_server_that_invents_federations_fills_no_disk(tmp_path: Path) -> None:
    run_tiny(config_at(tmp_path, rounds=1), node_configs=[node(tmp_path)])
    found = shelf(tmp_path).find(LAST)
    for number in range(MOST_FEDERATIONS + 5):
        other = found.folder.parents[1] / f"made{number:03d}" / "round-00000001"
        other.mkdir(parents=True)
        (other / "personal_model.json").write_text("{}")
    shelf(tmp_path)._prune()
    assert len(shelf(tmp_path).federations()) == MOST_FEDERATIONS


def test_without_a_model_it_says_when_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has one after the first round"):
        Shelf(tmp_path).find(BEST)


def test_a_refused_participant_does_not_fail_the_others(tmp_path: Path) -> None:
    own = node(tmp_path) | {"model": f"{HERE}:explodes"}
    with pytest.raises(RunError):
        run_tiny(config_at(tmp_path, rounds=1), node_configs=[own])
    assert shelf(tmp_path).federations() == []


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A participant with 16-bit pictures of two classes, after three rounds."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for name, shade in {"dark": 300, "light": 3000}.items():
        (folder / "scans" / name).mkdir(parents=True)
        for j in range(30):
            pixels = rng.integers(0, 900, (12, 12)) + shade
            Image.fromarray(pixels.astype(np.uint16)).save(folder / "scans" / name / f"{j}.png")
    own = node(folder, **{"dataset": "folder", "data-dir": str(folder / "scans"), "model": "mlp"})
    own.pop("partition-id")
    config = config_at(folder, rounds=3, global_model="mlp", dataset="folder", image_size=32)
    run_tiny(config, node_configs=[own | {"global-model": "mlp"}])
    return folder


def test_models_are_listed(site: Path, capsys: Capture) -> None:
    assert main(["model", "list", str(site / "state" / "a"), "--json"]) == 0
    (row, *_) = rows = json.loads(capsys.readouterr().out)
    assert rows[-1]["which"] in ("last, best", "last")
    assert row.keys() >= {"validation", "test", "alone", "gain", "round", "folder"}
    assert main(["model", "list", str(site / "state" / "a")]) == 0
    assert "last" in capsys.readouterr().out
    assert main(["model", "list", str(site / "nobody")]) == 2


def test_the_status_says_what_joining_is_worth(site: Path, capsys: Capture) -> None:
    state = site / "state" / "a"
    assert main(["status", str(state), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3, 3, 3]  # tested, then at the end
    assert [bool(row["run_ended"]) for row in found["rounds"]] == [False] * 4 + [True]
    assert found["run_ended"] is True
    assert found["joined"] is False
    assert found["seconds_since"] >= 0
    assert found["rounds"][-1].keys() >= {"test_accuracy", "accuracy_alone", "gain", "time"}
    with FileLock(state / "join.lock"):
        assert main(["status", str(state)]) == 0
    text = capsys.readouterr().out
    assert "a  joined  federation " in text
    assert "joining is worth" in text
    assert "the run has ended" in text
    rounds = re.findall(r"│ (\d) +│", text)
    assert rounds == ["1", "2", "3"]
    assert main(["status", str(site / "nobody")]) == 2
    (site / "state" / "new").mkdir()
    (site / "state" / "new" / "join.lock").touch()
    assert main(["status", str(site / "state" / "new")]) == 0
    assert "no model has come yet" in capsys.readouterr().out


def test_pictures_are_classified_into_a_table(site: Path, capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    words = [str(site / "state" / "a"), str(site / "scans")]
    assert main(["model", "predict", *words, str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert rows[0].keys() == {"file", "class", "p(dark)", "p(light)"}
    right = [row["file"].startswith(row["class"]) for row in rows]
    assert sum(right) > 50
    assert all(abs(float(r["p(dark)"]) + float(r["p(light)"]) - 1) < 1e-3 for r in rows)
    assert main(["model", "evaluate", *words]) == 0
    text = capsys.readouterr().out
    assert f"accuracy          {sum(right) / 60:.3f}" in text
    assert "balanced accuracy" in text


def test_one_is_exported_with_its_program(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    words = [str(site / "state" / "a"), str(out), "--last", "--onnx"]
    assert main(["model", "export", *words]) == 0
    assert (out / "personal_model.onnx").stat().st_mode & 0o777 == 0o600
    model = torch.export.load(out / "personal_model.pt2").module()
    about = json.loads((out / "personal_model.json").read_text())
    shape = (3, about["in_channels"], about["image_size"], about["image_size"])
    assert model(torch.zeros(shape, dtype=torch.uint8)).shape == (3, 2)
    assert main(["model", "export", str(site / "state" / "a"), str(out)]) == 2
