"""The command line with Flower's simulation on Ray: the same numbers, honest status, no remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.__main__ import main
from experiments.run.engines import processes
from experiments.run.engines.home import bytecode_cache
from tests.support.deployment import wait_until
from tests.support.tiny import PRESET

PROJECT_ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    text = PRESET.replace('name = "inprocess"\n', "").replace("workers = 1\n", "")
    text = text.replace('"mh-pfedhn"', '"mh-pfedhn-gd"')
    more = 'max-in-flight = 0\nbuffer-size = 0\nglobal-model = "tests.support.tiny:small"\n'
    path.write_text(text + more)
    return str(path)


def untimed_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


OWNER = "MH_PFEDHN_TEST_OWNER"


@pytest.fixture(autouse=True)
def owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what these tests start be told from other runs on this machine."""
    monkeypatch.setenv(OWNER, str(os.getpid()))


def remains() -> list[int]:
    """Processes of any run that this test process started."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            marked = environment.get(processes.MARK, "").startswith("/tmp/mhp-")
            marked &= environment.get(OWNER) == str(os.getpid())
        except psutil.Error:
            continue
        if marked and processes.is_alive(process):
            found.append(process.pid)
    return found


def test_ray_and_one_process_give_the_same_numbers(experiment: str, tmp_path: Path) -> None:
    before = remains()
    for engine in ("ray", "inprocess"):
        arguments = ["run", experiment, "--engine", engine]
        assert main([*arguments, "--output-dir", str(tmp_path / engine)]) == 0
    assert untimed_rows(tmp_path / "ray") == untimed_rows(tmp_path / "inprocess")
    assert (tmp_path / "ray" / "curves.png").is_file()
    assert set(remains()) <= set(before)


@pytest.mark.slow  # on Ray; what Flower says of a run is read in tests/unit/experiments as well
def test_a_failed_run_is_not_taken_for_a_good_one(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = ["run", experiment, "--output-dir", str(folder), "--set"]
    assert main([*arguments, "models=tests.support.tiny:explodes", "wait-for-clients-s=1"]) == 1
    out = capsys.readouterr().out
    assert "this model cannot run" in out
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert (folder / "superlink.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process(
    experiment: str, tmp_path: Path, number: signal.Signals
) -> None:
    before = remains()
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "experiments", "run", experiment, "--rounds", "100000"]
    process = subprocess.Popen(
        [*command, "--output-dir", str(folder)],
        cwd=PROJECT_ROOT,
        env={**os.environ, **bytecode_cache(os.environ)},
    )
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text(), 300, "a round is done")
    process.send_signal(number)
    assert process.wait(60) == 130
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert set(remains()) <= set(before)
