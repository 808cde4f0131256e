from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.report.events import tag, write_rows
from tests.unit.experiments.run_folders import write_seed

INSTALLED = importlib.util.find_spec("tensorboard") is not None


class Recorder:
    """Takes what a SummaryWriter takes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int, float | None]] = []

    def add_scalar(self, name: str, value: float, step: int, walltime: float | None) -> None:
        self.seen.append((name, value, step, walltime))

    def flush(self) -> None: ...


def test_every_number_goes_under_a_readable_name_at_its_time() -> None:
    writer = Recorder()
    rows = [
        {"round": 1, "accuracy_micro": 0.5, "seconds_round": 2.0, "grad_norm": float("nan")},
        {"round": 2, "seconds_round": 3.0, "note": "text"},
    ]
    write_rows(writer, rows, started=100.0)
    assert writer.seen == [
        ("accuracy/accuracy_micro", 0.5, 1, 102.0),
        ("seconds/seconds_round", 2.0, 1, 102.0),
        ("seconds/seconds_round", 3.0, 2, 105.0),
    ]
    assert tag("test_loss") == "loss/test_loss"
    assert tag("coherence") == "server/coherence"


@pytest.mark.skipif(INSTALLED, reason="tensorboard is installed")
def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["tensorboard", str(write_seed(tmp_path / "a"))]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert main(["run", "quickstart", "--tensorboard", "--output-dir", str(folder)]) == 2
    assert not folder.exists()


@pytest.mark.skipif(not INSTALLED, reason="tensorboard is not installed")
def test_runs_become_event_files(tmp_path: Path) -> None:
    run = write_seed(tmp_path / "a")
    for _ in range(2):
        assert main(["tensorboard", str(run), "--logdir", str(tmp_path / "logs")]) == 0
    assert len(list((tmp_path / "logs" / "a").glob("events.out.tfevents.*"))) == 1
