"""Sweeps: cells as light processes that write real run folders; one test kills a real sweep, one
(slow) a real run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import torch
from rich.console import Console

from common.errors import RunError
from experiments.__main__ import main
from experiments.report.runs import Run
from experiments.sweep.cells import (
    identify,
    keep_newest,
    process_of,
    read_note,
    slim,
    standing,
    write_note,
)
from experiments.sweep.command import status_table
from experiments.sweep.display import Display, Forecast
from experiments.sweep.plan import Cell, Plan
from experiments.sweep.runner import (
    Runner,
    _environment,
    _require_source,
    cell_command,
    holder,
    own,
)
from server_app.output.checkpoint import save_checkpoint
from tests.unit.experiments.run_folders import write_seed
from tests.unit.experiments.test_command_line import TINY

SWEEP = """
preset = "tiny.toml"
seeds = [1, 2]
output-dir = "out"
[variants.good]
rounds = 2
[variants.bad]
rounds = 3
"""
CELL = """
import json, pathlib, sys
folder, variant, resume = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if variant == "bad":
    sys.exit("ValueError: out of luck")
row = {"round": 2, "accuracy_micro": 0.5, "seconds_round": 1.0}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(folder / "summary.json").write_text(json.dumps({"status": "completed", "resume": resume}))
"""


def light(cell: Cell, resume: bool) -> Sequence[str]:
    """A cell that takes 30 ms: the good ones complete, the bad ones fail."""
    return [sys.executable, "-S", "-c", CELL, str(cell.folder), cell.variant, str(resume)]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "s.toml").write_text(SWEEP)
    return Plan.load(tmp_path / "s.toml")


def run(plan: Plan, command=light) -> tuple[list[Cell], str]:  # noqa: ANN001
    out = io.StringIO()
    failed = Runner(plan, Display(Console(file=out, width=200)), jobs=2, command=command).run()
    return failed, out.getvalue()


def test_a_failing_cell_is_reported_and_the_others_go_on(plan: Plan) -> None:
    failed, out = run(plan)
    assert [cell.variant for cell in failed] == ["bad", "bad"]
    assert "ended with exit status 1: ValueError: out of luck" in out
    assert out.count("done ") == 2
    states = [standing(cell).state for cell in plan.cells]
    assert states == ["completed", "completed", "failed", "failed"]
    note = read_note(plan.cells[0].folder)
    assert (note["variant"], note["seed"], note["grid"]) == ("good", 1, {})
    assert note["command"].startswith("mh-pfedhn run ")
    assert "output-dir" not in note["command"]


def test_what_is_completed_is_skipped_and_what_failed_is_tried_again(plan: Plan) -> None:
    run(plan)
    before = [(cell.folder / "summary.json").stat().st_mtime_ns for cell in plan.cells[:2]]
    failed, out = run(plan)
    assert "2 of 4 cells are completed and skipped" in out
    assert len(failed) == 2
    after = [(cell.folder / "summary.json").stat().st_mtime_ns for cell in plan.cells[:2]]
    assert before == after


def test_a_cell_cut_off_before_its_first_checkpoint_starts_anew(plan: Plan) -> None:
    cell = plan.cells[0]
    write_note(cell, {"file": "s.toml"})
    write_seed(cell.folder, status="interrupted")
    (cell.folder / "state").mkdir()
    assert standing(cell).state == "cut off"
    run(plan)
    assert json.loads((cell.folder / "summary.json").read_text())["resume"] == "False"
    assert not (cell.folder / "state").exists()
    assert not (cell.folder / "clients.csv").exists()


def test_a_run_of_somebody_else_is_not_touched(plan: Plan) -> None:
    cell = plan.cells[0]
    write_seed(cell.folder, status="interrupted")
    failed, out = run(plan)
    assert cell in failed
    assert "holds a run that no sweep started" in out
    run(plan)  # nor by the next sweep
    assert len(Run.load(cell.folder).rows) == 2


def test_a_cell_that_a_killed_sweep_left_running_is_followed(plan: Plan) -> None:
    cell = plan.cells[0]
    wait = f"import time; time.sleep(1.5)\n{CELL}"
    command = [sys.executable, "-S", "-c", wait, str(cell.folder), "good", "orphan"]
    with subprocess.Popen(command) as orphan:
        write_note(cell, {"process": identify(psutil.Process(orphan.pid))})
        assert standing(cell).state == "running"
        _, out = run(plan)
    assert "found running, followed" in out
    assert json.loads((cell.folder / "summary.json").read_text())["resume"] == "orphan"


def test_status_says_that_a_cell_runs_on_without_its_sweep(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    write_note(plan.cells[0], {"process": identify(psutil.Process()), "failed": ""})
    write_note(plan.cells[1], {"process": {"pid": os.getpid(), "started": 1.0}, "failed": ""})
    assert main(["sweep", str(plan.file), "--status"]) == 0
    out = capsys.readouterr().out
    assert "4 cells: 1 running, 1 cut off, 2 waiting" in out
    assert "not running, but 1 cell runs on: the next sweep follows it; folder" in out


def test_two_sweeps_cannot_share_a_folder(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(plan.file)
    with own(plan.folder):
        assert holder(plan.folder) == psutil.Process().pid
        with pytest.raises(RunError, match=r"another sweep \(process \d+\) is at work in"):
            run(plan)
        assert main(["sweep", file, "--background"]) == 2
        assert "another sweep" in capsys.readouterr().err
    assert holder(plan.folder) is None


def test_status_shows_every_cell_and_fails_when_one_failed(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(plan.file), "--status"]) == 0
    assert "4 cells: 4 waiting" in capsys.readouterr().out
    run(plan)
    assert main(["sweep", str(plan.file), "--status"]) == 1
    out = capsys.readouterr().out
    assert "4 cells: 2 completed, 2 failed" in out
    assert "out of luck" in out
    assert "not running" in out
    _, counts = status_table(plan)
    assert counts == {"completed": 2, "failed": 2}


def test_time_left_comes_from_each_variants_own_rounds(plan: Plan) -> None:
    good, _, bad, _ = plan.cells
    forecast = Forecast(plan.cells)
    assert forecast.seconds() is None
    forecast.cost(good, 2, 8.0)
    assert forecast.seconds() == (2 + 2) * 4.0 + (3 + 3) * 4.0  # nothing known of "bad" yet
    forecast.cost(bad, 1, 10.0)
    forecast.at(bad, 1)
    assert forecast.seconds_of(bad) == 20.0
    forecast.gone(good)
    assert forecast.seconds(jobs=2) == (2 * 4.0 + (2 + 3) * 10.0) / 2


LIGHT = """
[engine]
name = "inprocess"
num-clients = 2
workers = 1
[config]
method = "local"
rounds = 2
dataset = "digits"
models = "mlp"
partition = "iid"
max-client-examples = 40
cache-dir = "cache"
"""


def wait_for_process(cell: Cell, *, timeout_s: float = 120.0) -> psutil.Process:
    end = monotonic() + timeout_s
    while (found := process_of(read_note(cell.folder))) is None:
        assert monotonic() < end, f"{cell.name} was not started"
        sleep(0.02)
    return found


def test_after_kill_9_of_a_sweep_every_cell_completes_exactly_once(tmp_path: Path) -> None:
    """One cell is there already; the sweep dies while the second one runs; a third one waits."""
    (tmp_path / "light.toml").write_text(LIGHT)
    sweep = 'preset = "light.toml"\nseeds = [1, 2, 3]\noutput-dir = "o"\n'
    (tmp_path / "s.toml").write_text(sweep)
    plan = Plan.load(tmp_path / "s.toml")
    done, orphan, waiting = plan.cells
    before = (write_seed(done.folder) / "summary.json").stat().st_mtime_ns
    write_note(done, {"file": str(plan.file)})
    command = [sys.executable, "-m", "experiments", "sweep", str(plan.file)]
    surroundings = {**_environment(), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=surroundings) as killed:
        try:
            child = wait_for_process(orphan)
        finally:
            killed.kill()
    try:
        assert killed.returncode == -9
        assert standing(orphan).state == "running"
        assert not waiting.folder.exists()
        again = subprocess.run(
            command, env=surroundings, capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert again.returncode == 0, again.stdout + again.stderr
    assert [standing(cell).state for cell in plan.cells] == ["completed"] * 3
    assert (done.folder / "summary.json").stat().st_mtime_ns == before
    assert not (done.folder / "console.log").exists(), "it was run again"
    assert read_note(orphan.folder)["process"]["pid"] == child.pid, "it was started twice"
    for cell in (orphan, waiting):
        assert [row["round"] for row in Run.load(cell.folder).rows] == [1, 2]
        assert (cell.folder / "console.log").read_text().count("first round after") == 1
        assert read_note(cell.folder)["resumed_after"] == []


@pytest.mark.slow
def test_a_killed_run_is_resumed_from_its_checkpoint(tmp_path: Path) -> None:
    """A real child, killed after its first checkpoint; the next sweep goes on, and slims it."""
    (tmp_path / "tiny.toml").write_text(TINY.replace("num-clients = 3", "num-clients = 2"))
    settings = 'models = "tests.support.tiny:small"\nrounds = 25\ncheckpoint-every = 5\n'
    (tmp_path / "s.toml").write_text(f'preset = "tiny.toml"\noutput-dir = "o"\n[fixed]\n{settings}')
    plan = Plan.load(tmp_path / "s.toml")
    (cell,) = plan.cells

    def kill_after_a_checkpoint() -> None:
        while not list((cell.folder / "checkpoint").glob("checkpoint-*")):
            sleep(0.02)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(read_note(cell.folder)["process"]["pid"])).kill()

    threading.Thread(target=kill_after_a_checkpoint, daemon=True).start()
    failed, out = run(plan, cell_command)
    assert failed == [cell]
    assert "exit status -9" in out
    cut = standing(cell).server_round
    assert 5 <= cut < 25

    failed, out = run(plan, cell_command)
    assert failed == []
    assert "resumed " in out
    assert read_note(cell.folder)["resumed_after"] == [cut]
    assert "resume-from" not in read_note(cell.folder)["command"]
    assert [int(row["round"]) for row in Run.load(cell.folder).rows] == list(range(1, 26))
    assert not (cell.folder / "checkpoint").exists()
    assert (cell.folder / "embeddings.safetensors").stat().st_size > 0


def test_a_checkpoint_that_cannot_be_read_is_kept(plan: Plan) -> None:
    cell = plan.cells[0]
    broken = cell.folder / "checkpoint" / "checkpoint-00000001"
    broken.mkdir(parents=True)
    (broken / "tensors.safetensors").write_bytes(b"cut")
    slim(cell)
    assert broken.exists()


def test_a_completed_cell_keeps_its_newest_whole_checkpoint(plan: Plan) -> None:
    cell = plan.cells[0]
    folder = cell.folder / "checkpoint"
    for number in range(3):
        save_checkpoint(folder, tensors={"a": torch.full((4,), float(number))}, meta={})
    os.truncate(folder / "checkpoint-00000003" / "tensors.safetensors", 8)
    keep_newest(cell)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-00000002"]
    (folder / "checkpoint-00000002" / "meta.json").write_text("cut")
    keep_newest(cell)
    assert len(list(folder.iterdir())) == 1  # nothing whole is left: what is there stays


def test_a_cell_waits_for_the_one_it_goes_on_from(tmp_path: Path, plan: Plan) -> None:
    first, other, *_ = plan.cells
    later = replace(other, after=first.folder)
    runner = Runner(plan, Display(Console(file=io.StringIO())), jobs=2)
    queue = [later, first]
    assert runner._next(queue) is first
    assert runner._next(queue) is later  # nobody runs the first any more
    assert runner._next([]) is None


def test_a_cell_does_not_go_on_from_one_that_failed(plan: Plan) -> None:
    first, other, *_ = plan.cells
    later = replace(other, after=first.folder)
    with pytest.raises(RunError, match=r"goes on from .* which did not complete"):
        _require_source(later)
    first.folder.mkdir(parents=True)
    (first.folder / "summary.json").write_text('{"status": "interrupted"}')
    with pytest.raises(RunError, match="did not complete"):
        _require_source(later)
    (first.folder / "summary.json").write_text('{"status": "completed"}')
    _require_source(later)
