"""A table against one of its rows: pairs of participants, and an interval by bootstrap."""

from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.report.against import Difference
from experiments.report.groups import load_study
from tests.unit.experiments.run_folders import write_seed

Capture = pytest.CaptureFixture[str]
ALONE = (0.5, 0.5, 0.6, 0.6)
BETTER = (0.6, 0.7, 0.7, 0.5)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (1, 2):
        write_seed(tmp_path / f"a{seed}", method="local", seed=seed, clients=ALONE)
        write_seed(tmp_path / f"b{seed}", method="mh-pfedhn", seed=seed, clients=BETTER)
    write_seed(tmp_path / "c", method="fedavg", seed=3, clients=BETTER)
    return tmp_path


def test_participants_are_paired(runs: Path) -> None:
    groups = {group.method: group for group in load_study([str(runs)]).groups}
    found = Difference.between(groups["mh-pfedhn"], groups["local"])
    assert found is not None
    assert found.mean == pytest.approx(100 * np.mean(np.subtract(BETTER, ALONE)))
    assert (found.num_better, found.count) == (6, 8)
    spread = 100 * np.std(np.subtract(BETTER, ALONE)) / np.sqrt(8)
    assert found.low == pytest.approx(found.mean - 1.96 * spread, abs=0.35 * spread)
    assert found.high == pytest.approx(found.mean + 1.96 * spread, abs=0.35 * spread)
    assert Difference.between(groups["fedavg"], groups["local"]) is None, "no seed in common"
    assert Difference.between(groups["local"], groups["local"]) is None


def test_the_command_prints_it(
    runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert main(["compare", str(runs), "--against", "Local", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| over Local | gain |" in lines[0]
    ours = next(line for line in lines if line.startswith("| MH-pFedHN |"))
    assert "+7.5 [" in ours
    assert "6 of 8" in ours
    assert main(["compare", str(runs), "--against", "Lokal"]) == 2
    assert "Did you mean 'Local'" in " ".join(capsys.readouterr().err.split())
