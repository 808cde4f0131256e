"""Sweeps: cells as light processes that write real run folders; one test kills a real sweep, one
(slow) a real run."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from experiments.__main__ import main
from experiments.report.cells import state_of, tidy, write_note
from experiments.report.plan import Cell, Plan
from experiments.report.runs import Run, process_mark, process_of
from experiments.report.sweep import Sweep, cell_command, environment, holder, own, time_left
from server_app.output.checkpoint import save_checkpoint
from tests.support.tiny import PRESET
from tests.unit.experiments.run_folders import write_seed

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
    (tmp_path / "tiny.toml").write_text(PRESET)
    (tmp_path / "s.toml").write_text(SWEEP)
    return Plan.load(tmp_path / "s.toml")


def run(plan: Plan, command=light) -> tuple[int, str]:  # noqa: ANN001
    out = io.StringIO()
    code = Sweep(plan, Console(file=out, width=200), jobs=2, command=command).run()
    return code, out.getvalue()


def states(plan: Plan) -> list[str]:
    return [state_of(Run.read(cell.folder)) for cell in plan.cells]


def summary(cell: Cell) -> dict[str, Any]:
    return dict(Run.read(cell.folder).summary)


def test_a_failing_cell_is_reported_and_the_others_go_on(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(plan.file), "--status"]) == 0
    assert "4 cells: 4 waiting" in capsys.readouterr().out
    code, out = run(plan)
    assert code == 1
    assert out.count("ended with exit status 1: ValueError: out of luck") == 2
    assert out.count("done ") == 2
    assert states(plan) == ["completed", "completed", "failed", "failed"]
    note = Run.read(plan.cells[0].folder).note
    assert (note["variant"], note["seed"], note["grid"]) == ("good", 1, {})
    assert note["command"].startswith("mh-pfedhn run ")
    assert "output-dir" not in note["command"]
    assert main(["sweep", str(plan.file), "--status"]) == 1
    out = capsys.readouterr().out
    assert "4 cells: 2 completed, 2 failed" in out
    assert "out of luck" in out
    assert "not running; folder" in out


def test_what_is_completed_is_skipped_and_what_failed_is_tried_again(plan: Plan) -> None:
    run(plan)
    before = [(cell.folder / "summary.json").stat().st_mtime_ns for cell in plan.cells[:2]]
    _, out = run(plan)
    assert "2 of 4 cells are completed and skipped" in out
    assert out.count("out of luck") == 2
    after = [(cell.folder / "summary.json").stat().st_mtime_ns for cell in plan.cells[:2]]
    assert before == after


def test_a_cell_cut_off_before_its_first_checkpoint_starts_anew(plan: Plan) -> None:
    cell = plan.cells[0]
    write_note(cell, file="s.toml")
    write_seed(cell.folder, status="interrupted")
    (cell.folder / "state").mkdir()
    assert states(plan)[0] == "cut off"
    run(plan)
    assert summary(cell)["resume"] == "False"
    assert not (cell.folder / "state").exists()
    assert not (cell.folder / "clients.csv").exists()


def test_a_run_of_somebody_else_is_not_touched(plan: Plan) -> None:
    cell = plan.cells[0]
    write_seed(cell.folder, status="interrupted")
    for _ in range(2):  # nor by the next sweep
        _, out = run(plan)
        assert "holds a run that no sweep started" in out
    assert len(Run.load(cell.folder).rows) == 2


def test_a_cell_that_a_killed_sweep_left_running_is_followed(plan: Plan) -> None:
    cell = plan.cells[0]
    wait = f"import time; time.sleep(1.5)\n{CELL}"
    command = [sys.executable, "-S", "-c", wait, str(cell.folder), "good", "orphan"]
    with subprocess.Popen(command) as orphan:
        write_note(cell, process=process_mark(psutil.Process(orphan.pid)))
        assert states(plan)[0] == "running"
        _, out = run(plan)
    assert "found running, followed" in out
    assert summary(cell)["resume"] == "orphan"


def test_status_says_that_a_cell_runs_on_without_its_sweep(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    write_note(plan.cells[0], process=process_mark(psutil.Process()))
    write_note(plan.cells[1], process={"pid": os.getpid(), "started": 1.0})
    assert main(["sweep", str(plan.file), "--status"]) == 0
    out = capsys.readouterr().out
    assert "4 cells: 1 running, 1 cut off, 2 waiting" in out
    assert "not running, but 1 cell runs on: the next sweep follows it; folder" in out


def test_two_sweeps_cannot_share_a_folder(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    with own(plan.folder):
        assert holder(plan.folder) == psutil.Process().pid
        for words in ([], ["--background"]):
            assert main(["sweep", str(plan.file), *words]) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert f"another sweep (process {os.getpid()}) is at work in" in said
    assert holder(plan.folder) is None


def test_time_left_comes_from_each_variants_own_rounds(plan: Plan) -> None:
    good, _, bad, _ = plan.cells
    assert time_left(plan.cells) is None
    write_seed(good.folder, accuracies=(0.1, 0.2), row={"seconds_round": 4.0})
    assert time_left(plan.cells) == 2 * 4.0 + (3 + 3) * 4.0  # nothing is known of "bad" yet
    write_seed(bad.folder, accuracies=(0.1,), row={"seconds_round": 10.0})
    assert time_left(plan.cells, jobs=2) == (2 * 4.0 + (2 + 3) * 10.0) / 2


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
    while (found := process_of(Run.read(cell.folder).note)) is None:
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
    write_note(done, file=str(plan.file))
    command = [sys.executable, "-m", "experiments", "sweep", str(plan.file)]
    surroundings = {**environment(), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=surroundings) as killed:
        try:
            child = wait_for_process(orphan)
        finally:
            killed.kill()
    try:
        assert killed.returncode == -9
        assert states(plan) == ["completed", "running", "waiting"]
        again = subprocess.run(
            command, env=surroundings, capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(plan) == ["completed"] * 3
    assert (done.folder / "summary.json").stat().st_mtime_ns == before
    assert not (done.folder / "console.log").exists(), "it was run again"
    assert Run.load(orphan.folder).note["process"]["pid"] == child.pid, "it was started twice"
    for cell in (orphan, waiting):
        found = Run.load(cell.folder)
        assert [row["round"] for row in found.rows] == [1, 2]
        assert (cell.folder / "console.log").read_text().count("first round after") == 1
        assert found.note["resumed_after"] == []


@pytest.mark.slow
def test_a_killed_run_is_resumed_from_its_checkpoint(tmp_path: Path) -> None:
    """A real child, killed after its first checkpoint; the next sweep goes on, and slims it."""
    (tmp_path / "tiny.toml").write_text(PRESET.replace("num-clients = 3", "num-clients = 2"))
    settings = 'models = "tests.support.tiny:small"\nrounds = 25\ncheckpoint-every = 5\n'
    (tmp_path / "s.toml").write_text(f'preset = "tiny.toml"\noutput-dir = "o"\n[fixed]\n{settings}')
    plan = Plan.load(tmp_path / "s.toml")
    (cell,) = plan.cells

    def kill_after_a_checkpoint() -> None:
        while not list((cell.folder / "checkpoint").glob("checkpoint-*")):
            sleep(0.02)
        with contextlib.suppress(psutil.NoSuchProcess):
            wait_for_process(cell).kill()

    threading.Thread(target=kill_after_a_checkpoint, daemon=True).start()
    code, out = run(plan, cell_command)
    assert code == 1
    assert "exit status -9" in out
    cut = Run.load(cell.folder).rounds_done
    assert 5 <= cut < 25

    code, out = run(plan, cell_command)
    assert code == 0
    assert "resumed " in out
    found = Run.load(cell.folder)
    assert found.note["resumed_after"] == [cut]
    assert "resume-from" not in found.note["command"]
    assert [int(row["round"]) for row in found.rows] == list(range(1, 26))
    assert not (cell.folder / "checkpoint").exists()
    assert (cell.folder / "embeddings.safetensors").stat().st_size > 0


def test_a_completed_cell_keeps_what_is_needed_and_what_cannot_be_read(plan: Plan) -> None:
    cell = plan.cells[0]
    folder = cell.folder / "checkpoint"
    for number in range(3):
        tensors = {"embeddings.a": torch.full((4, 1), float(number))}
        save_checkpoint(folder, tensors=tensors, meta={})
    os.truncate(folder / "checkpoint-00000003" / "tensors.safetensors", 8)
    tidy(cell, keep=True)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-00000002"]
    tensors_file = folder / "checkpoint-00000002" / "tensors.safetensors"
    whole = tensors_file.read_bytes()
    tensors_file.write_bytes(b"cut")
    for keep in (True, False):
        tidy(cell, keep=keep)
        assert tensors_file.exists()  # nothing whole is left: what is there stays
    tensors_file.write_bytes(whole)
    tidy(cell, keep=False)
    assert not folder.exists()
    assert (cell.folder / "embeddings.safetensors").exists()


def test_a_cell_waits_for_the_one_it_goes_on_from(plan: Plan) -> None:
    good, other, bad, last = plan.cells
    later = [replace(other, after=good.folder), replace(last, after=bad.folder)]
    code, out = run(replace(plan, cells=(*later, good, bad)))
    assert code == 1
    assert out.index(f"done      {good.name}") < out.index(f"started   {other.name}")
    assert f"failed    {last.name}  {last.name} goes on from {bad.name}, which did not" in out
    assert states(plan) == ["completed", "completed", "failed", "failed"]
