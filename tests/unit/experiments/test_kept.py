"""docs/parallel.png comes from the curves that are kept beside it."""

from pathlib import Path

import pytest

from experiments.report.kept import DOCS, Kept, draw_kept, line_of, read_runs
from experiments.report.looks import Look

CSV = "run,round,accuracy_micro\na seed=1,1,0.1\na seed=1,2,0.3\na seed=2,1,0.2\na seed=2,2,\n"


def test_seeds_are_averaged_over_the_rounds_that_all_have(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(CSV)
    runs = read_runs(tmp_path / "runs.csv")
    curve = line_of(Kept("line", "local", "a", (1, 2)), runs, Look(0, 0)).curve
    assert curve.x == (1.0,)
    assert curve.y == pytest.approx((0.15,))
    assert curve.error == pytest.approx((0.05,))


def test_every_line_of_the_picture_is_in_the_file(tmp_path: Path) -> None:
    draw_kept(read_runs(DOCS / "parallel-runs.csv"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
