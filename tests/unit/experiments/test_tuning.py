"""Settings chosen by validation: each variant's candidates are tried, then the best one runs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from client_app.data.examples import load_client_data
from common.config import ClientSection, RunConfig
from common.errors import ConfigError
from experiments.report import command, sweep
from experiments.report.plan import Cell, Plan
from tests.support.tiny import HERE, PRESET

SWEEP = """
preset = "tiny.toml"
seeds = [1, 2]
output-dir = "out"
[tune]
seed = 11
[fixed]
validation-fraction = 0.1
[grid]
learning-rate = [0.1, 0.2, 0.3]
[variants.one]
rounds = 2
[variants.two]
method = "fedavg"
[variants.two.grid]
momentum = [0.0, 0.5]
[variants.fixed]
method = "local"
[variants.fixed.grid]
learning-rate = [0.7]
"""
CELL = """
import json, pathlib, sys
folder, accuracy = pathlib.Path(sys.argv[1]), float(sys.argv[2])
rows = [{"round": 1, "accuracy_micro": 0.99, "seconds_round": 1.0},
        {"round": 2, "accuracy_micro": accuracy, "seconds_round": 1.0}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "summary.json").write_text(json.dumps({"status": "completed"}))
"""


def light(cell: Cell, resume: bool) -> Sequence[str]:
    """A cell whose last round is best with a rate of .2, and without momentum."""
    rate, momentum = (float(cell.settings.get(k, 0.0)) for k in ("learning-rate", "momentum"))
    accuracy = 0.5 - abs(rate - 0.2) - momentum / 10
    return [sys.executable, "-S", "-c", CELL, str(cell.folder), str(accuracy)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(PRESET)
    (tmp_path / "s.toml").write_text(SWEEP)
    return tmp_path / "s.toml"


def test_the_best_of_validation_runs_on_test_with_every_seed(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = Plan.load(file)
    assert trials.is_trial
    assert [(cell.variant, cell.seed) for cell in trials.cells] == [
        *[("one", 11)] * 3, *[("two", 11)] * 6,
    ]  # fmt: skip
    assert all(cell.settings["tested-on"] == "validation" for cell in trials.cells)
    assert trials.folder.name == "out-trials"
    runner = sweep.Sweep

    def with_light_cells(*arguments: object, **options: object) -> sweep.Sweep:
        return runner(*arguments, **options, command=light)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "Sweep", with_light_cells)
    main = __import__("experiments.__main__", fromlist=["main"]).main
    assert main(["sweep", str(file), "--jobs", "2"]) == 0
    found = Plan.load(file)
    assert not found.is_trial
    assert found.folder.name == "out"
    chosen = {cell.variant: dict(cell.settings) for cell in found.cells}
    assert [cell.seed for cell in found.cells] == [1, 2] * 3
    assert {name: s["learning-rate"] for name, s in chosen.items()} == {
        "one": 0.2, "two": 0.2, "fixed": 0.7,
    }  # fmt: skip
    assert chosen["two"]["momentum"] == 0.0
    assert all("tested-on" not in settings for settings in chosen.values())
    assert all((cell.folder / "summary.json").exists() for cell in found.cells)
    assert command.__doc__
    capsys.readouterr()
    assert main(["sweep", str(file), "--status"]) == 0
    assert "6 cells: 6 completed" in capsys.readouterr().out


def test_a_trial_that_is_missing_comes_first(file: Path) -> None:
    trials = Plan.load(file)
    for cell in trials.cells[1:]:
        cell.folder.mkdir(parents=True)
        (cell.folder / "summary.json").write_text(json.dumps({"status": "completed"}))
        (cell.folder / "metrics.jsonl").write_text("")
    assert Plan.load(file).is_trial


def test_validation_examples_stand_for_test_ones() -> None:
    settings = {"dataset": f"{HERE}:patterns", "image-size": 8, "test-fraction": 0.3,
                "validation-fraction": 0.1, "num-partitions": 3, "partition": "iid"}  # fmt: skip
    plain, held = (
        load_client_data(
            ClientSection.checked({**settings, **more}, "x"), partition_id=1, seed=1,
            device=torch.device("cpu"),
        )
        for more in ({}, {"tested-on": "validation"})
    )  # fmt: skip
    assert torch.equal(plain.train_images, held.train_images)
    assert torch.equal(plain.validation_images, held.test_images)
    assert torch.equal(plain.validation_labels, held.test_labels)
    assert not np.isin(plain.test_rows, held.test_rows).any()
    with pytest.raises(ConfigError, match="there are no such examples"):
        RunConfig.parse({"tested-on": "validation", "validation-fraction": 0.0,
                         "method": "fedavg"})  # fmt: skip
