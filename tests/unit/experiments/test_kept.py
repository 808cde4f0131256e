"""docs/parallel.png comes from the curves that are kept beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import RunError
from experiments.report.kept import DOCS, PANELS, Kept, curve_of, draw_kept, read_runs

CSV = "run,round,accuracy_micro\na seed=1,1,0.1\na seed=1,2,0.3\na seed=2,1,0.2\na seed=2,2,\n"


def test_seeds_are_averaged_over_the_rounds_that_all_have(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(CSV)
    runs = read_runs(tmp_path / "runs.csv")
    curve = curve_of(Kept("line", "local", "a", (1, 2)), runs)
    assert curve.x == (1.0,)
    assert curve.y == pytest.approx((0.15,))
    assert curve.error == pytest.approx((0.05,))
    with pytest.raises(RunError, match="a seed=3"):
        curve_of(Kept("line", "local", "a", (1, 3)), runs)
    with pytest.raises(RunError, match="cannot read"):
        read_runs(tmp_path / "none.csv")


def test_every_line_of_the_picture_is_in_the_file(tmp_path: Path) -> None:
    runs = read_runs(DOCS / "parallel-runs.csv")
    ends = [curve_of(kept, runs).x[-1] for kept in PANELS["CIFAR-100, 10 classes a client"]]
    assert max(ends) == 60
    draw_kept(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
