"""The command line on real runs of a tiny federation, in process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest

from experiments.__main__ import main
from tests.support.tiny import PRESET
from tests.unit.experiments.run_folders import write_run


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(PRESET)
    return path


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_completes_and_can_be_shown(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["run", str(experiment), "--rounds", "3", "--output-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count(f"run folder  {folder}") == 2
    assert "round 3/3" in out
    assert "completed" in out
    assert read_summary(folder)["status"] == "completed"
    assert (folder / "curves.png").stat().st_size > 10_000
    assert (folder / "clients.png").stat().st_size > 10_000
    assert "round 3/3" in (folder / "run.log").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert (config["run-name"], config["num-partitions"], config["min-clients"]) == ("tiny", 3, 3)
    assert len((folder / "clients.csv").read_text().splitlines()) == 1 + 3

    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "tests.support.tiny:wide" in shown
    assert str(folder / "clients.png") in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quikstart"], "Did you mean 'quickstart'?"),
        (["run", "quickstart", "--set", "server-lrr=1"], "Did you mean 'server-lr'?"),
        (["run", "quickstart", "--engine", "rai"], "engine: name = 'rai' cannot be used"),
        (["run", "quickstart", "--clients", "0"], "engine: num-clients = 0 cannot be used"),
        (["show", "nowhere"], "run 'nowhere'"),  # unknown, or there are no runs at all
    ],
)
def test_mistakes_are_explained_and_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_holds_a_run_is_not_overwritten(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "old")
    assert main(["run", str(experiment), "--output-dir", str(folder)]) == 2
    assert "already holds a run. Choose another --output-dir" in capsys.readouterr().err
    assert read_summary(folder)["status"] == "completed"


def test_list_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "quickstart" in out
    assert "cifar100-sequential" in out


def test_show_compares_with_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", rounds=10, models="cnn")
    rows = [[i, 1.0, 0.97] for i in range(1, 21)]
    content = {"source": "somebody", "columns": ["round", "loss", "accuracy"], "rows": rows}
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert main(["show", str(folder), "--reference", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "reference: somebody" in out
    assert "+3.0" in out
    assert (folder / "curves-reference.png").is_file()


@pytest.fixture
def heard() -> Iterator[None]:
    """Hear Ctrl-C: a shell's background job, as this suite may be, starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# the signal may come between the opening of a file and the block that closes it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_what_was_learned(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    folder = tmp_path / "out"
    metrics = folder / "metrics.jsonl"

    def stop_after_four_rounds() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_after_four_rounds, daemon=True).start()
    arguments = ["--rounds", "100000", "--output-dir", str(folder)]
    assert main(["run", str(experiment), *arguments]) == 130
    said = capsys.readouterr().out
    assert "but rounds=100000" in said
    found = re.search(r"interrupted; the checkpoint is of round (\d+): go on with --set", said)
    assert found, said
    summary = read_summary(folder)
    assert summary["status"] == "interrupted"
    # the signal may come between a round's row and its checkpoint
    assert 3 <= summary["rounds"] - 1 <= int(found[1]) <= summary["rounds"]
    assert summary["reason"]


def test_the_commands_import_where_posix_modules_do_not_exist() -> None:
    """As on Windows; the libraries are loaded before, for here they need some of them."""
    code = """
import filelock, psutil, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import experiments.__main__, experiments.run.launch, experiments.run.engines.superlink
import experiments.deploy.checks, experiments.deploy.supervise
experiments.__main__.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "join" in done.stdout
