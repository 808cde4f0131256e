from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from experiments.console import make_console
from experiments.report.runs import Run, settle
from experiments.report.terminal import family_table, run_table
from experiments.run.launch import show
from tests.unit.experiments.run_folders import write_run, write_seed


def text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


def cells(table: Table) -> dict[str, list[str]]:
    """Rows by their first cell, split where columns are."""
    rows = [
        [cell.strip() for cell in line.split("   ") if cell.strip()]
        for line in text(table).splitlines()
    ]
    return {row[0]: row[1:] for row in rows if row}


def test_run_table_sums_the_run_up(tmp_path: Path) -> None:
    shown = text(run_table(Run.load(write_run(tmp_path / "a"))))
    for part in (
        "completed",
        "MH-pFedHN",
        "cnn, vgg8",
        "4 of 4",
        "40.0 % last, the best on validation",
        "38.0 %, standard deviation over clients 10.0 %",
        "20.0 %",
        "8.0 MB down, 4.0 MB up",
        "1:15",
    ):
        assert part in shown


def test_run_table_names_the_round_that_validation_chose(tmp_path: Path) -> None:
    run = Run.load(write_run(tmp_path / "a"))
    run.summary["best"] = {"round": 3, "accuracy_micro": 0.3}
    assert "40.0 % last, 30.0 % in round 3, the best on validation" in text(run_table(run))
    run.summary["best"] = None
    assert "validation" not in text(run_table(run))


def test_run_table_of_a_run_that_never_evaluated(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    settle(tmp_path, "failed", "no [clients] came", seed=1)
    shown = text(run_table(Run.load(tmp_path)))
    assert "failed" in shown
    assert "no [clients] came" in shown
    assert "micro accuracy" in shown


def test_family_table_weighs_by_examples(tmp_path: Path) -> None:
    rows = cells(family_table(Run.load(write_run(tmp_path / "a"))))
    assert rows["cnn"] == ["2", "1,000", "20", "55.0 %", "55.0 %", "50.0 %"]
    assert rows["vgg8"] == ["2", "2,000", "20", "75.0 %", "75.0 %", "70.0 %"]
    assert rows["all"] == ["4", "1,000 - 2,000", "40", "65.0 %", "65.0 %", "50.0 %"]


def test_what_joining_is_worth_is_said_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.load(write_seed(tmp_path / "a", alone=(0.4, 0.4, 0.7, 0.9)))  # +.1 +.2 .0 -.1
    rows = cells(family_table(run))
    assert rows["cnn"][-2:] == ["40.0 %", "+15.0"]
    assert rows["vgg8"][-2:] == ["80.0 %", "-5.0"]
    assert rows["all"][-2:] == ["60.0 %", "+5.0"]
    sentence = "gain over training alone: +5.0 points, 2 of 4 participants gain"
    show(run.folder, make_console())
    assert sentence in capsys.readouterr().out
    show(write_seed(tmp_path / "b"), make_console())
    assert "alone" not in capsys.readouterr().out
