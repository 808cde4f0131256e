from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError, RunError
from experiments.report.runs import Run, find_run, new_folder, settle
from tests.unit.experiments.run_folders import write_clients, write_run


def test_run_reads_every_part(tmp_path: Path) -> None:
    run = Run.load(write_run(tmp_path / "a"))
    assert run.name == "a"
    assert [row["round"] for row in run.rows] == [1, 2, 3, 4]
    assert [client.client_id for client in run.clients] == ["0", "1", "2", "3"]
    assert run.clients[3].accuracy == 0.8
    assert run.summary["status"] == "completed"


def test_families_come_from_the_blocks_of_the_run_config_or_from_sizes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert Run.load(folder).families() == {"0": "cnn", "1": "cnn", "2": "vgg8", "3": "vgg8"}
    write_clients(
        folder, ["vgg8", "cnn", "vgg8", "cnn"], (0.5, 0.6, 0.7, 0.8)
    )  # they chose models themselves
    assert Run.load(folder).families()["0"] == "2,000 parameters"
    one = Run.load(write_run(tmp_path / "b", models="cnn"))
    assert set(one.families().values()) == {"cnn"}


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "accu')
    assert len(Run.load(folder).rows) == 4


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run: neither summary.json nor metrics.jsonl"):
        Run.load(tmp_path)
    folder = write_run(tmp_path / "a")
    (folder / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"run folder .* cannot be read: JSONDecodeError"):
        Run.load(folder)


def test_runs_are_found_by_name_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MH_PFEDHN_RUNS", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        find_run("nothing")
    assert str(caught.value) == (
        f"no run 'nothing': {tmp_path} holds none at all. Give the path of a run folder, or make "
        "one: mh-pfedhn run quickstart."
    )
    folder = write_run(tmp_path / "quick-1")
    assert find_run("quick-1").folder == find_run(str(folder)).folder == folder
    with pytest.raises(ConfigError, match=r"unknown run 'quik-1'. Did you mean 'quick-1'\?"):
        find_run("quik-1")


def test_new_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MH_PFEDHN_RUNS", str(tmp_path))
    first = new_folder("quick")
    first.mkdir()
    second = new_folder("quick")
    assert first.parent == second.parent == tmp_path
    assert first.name.startswith("quick-2")
    assert first != second


def test_settle_says_how_a_killed_run_ended_unless_the_server_did(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    for reason in ("the machine burnt", "something vaguer"):
        settle(folder, "failed", reason, seed=1)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "the machine burnt")
    assert summary["rounds"] == 4
    settle(tmp_path, "failed", "no such data", seed=7)  # it had no config yet
    assert Run.load(tmp_path).seed == 7
