from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from experiments.run.progress import Pace, RowTail, follow, round_line
from tests.unit.experiments.run_folders import metric_row


def test_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = RowTail(path)
    assert tail.new_rows() == []
    line = json.dumps({"round": 1})
    path.write_text(line[:5])
    assert tail.new_rows() == []
    path.write_text(line + "\n" + line[:3])
    assert tail.new_rows() == [{"round": 1}]
    assert tail.new_rows() == []


def test_pace_is_the_mean_of_the_last_five_rounds_without_the_first() -> None:
    pace = Pace(rounds=10)
    assert pace.add({"round": 1, "seconds_round": 100.0}) is None
    assert pace.add({"round": 2, "seconds_round": 40.0}) == 320.0
    for number in range(3, 7):
        pace.add({"round": number, "seconds_round": 10.0})
    assert pace.add({"round": 7, "seconds_round": 10.0}) == 30.0
    assert Pace(rounds=1).add({"round": 1, "seconds_round": 5.0}) == 0.0


def test_round_line_says_what_happened() -> None:
    row = metric_row(3, 0.5123, num_failed=1, num_unanswered=2)
    assert round_line(row, rounds=40, left_s=370) == (
        "round  3/40  accuracy  51.2 %  test loss 1.488  train loss 0.667  3.0 MB  10.0 s"
        "  lost 3 clients  left 6:10"
    )
    measured = round_line(metric_row(3, 0.5, accuracy_alone=0.4), rounds=40, left_s=None)
    assert "accuracy  50.0 % (alone 40.0 %)  test loss" in measured
    line = round_line(metric_row(1, None), rounds=2, left_s=10)
    assert line == "round 1/2  train loss 2.000  3.0 MB  10.0 s  left 0:10"


def test_follow_prints_every_round_even_those_written_at_the_very_end(tmp_path: Path) -> None:
    out = io.StringIO()
    rows = [json.dumps(metric_row(k, 0.1 * k)) + "\n" for k in (1, 2, 3)]
    with follow(tmp_path, rounds=3, console=Console(file=out, width=120)):
        (tmp_path / "metrics.jsonl").write_text("".join(rows))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("round")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "left" not in lines[0]
    assert lines[2].endswith("left 0:00")
