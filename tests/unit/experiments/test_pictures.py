from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import RunError
from experiments.report.clients import draw_clients
from experiments.report.runs import Run
from server_app.output.figures import Reference, draw_curves, draw_steps
from tests.unit.experiments.run_folders import metric_row, write_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("accuracies", [[], [None], [0.3], [None, 0.5, None], [0.1, 0.2]])
def test_short_and_unevaluated_runs_can_be_drawn(
    tmp_path: Path, accuracies: list[float | None]
) -> None:
    rows = [metric_row(i, accuracy) for i, accuracy in enumerate(accuracies, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("content", ["[]", "{", '{"columns": ["round"], "rows": []}'])
def test_other_json_is_not_a_reference(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(RunError, match=r"r.json is not a reference curve. Expected JSON with"):
        Reference.load(tmp_path / "r.json")


def test_missing_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read the reference .*none.json: No such file"):
        Reference.load(tmp_path / "none.json")


@pytest.mark.parametrize("clients", [1, 4])
def test_clients_are_drawn(tmp_path: Path, clients: int) -> None:
    run = Run.load(write_run(tmp_path / "a", clients=clients, models="cnn"))
    assert draw_clients(run).read_bytes().startswith(PNG)
    (run.folder / "clients.csv").unlink()
    assert draw_clients(Run.load(run.folder)).read_bytes().startswith(PNG)


def test_steps_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    facts = {"rms_theta_change": 1e-3, "rms_delta": 2e-3, "effective_rate": 0.5}
    facts |= {"coherence": 0.1, "num_updates": 10.0, "mean_staleness": 0.0}
    rows = [metric_row(i, 0.1, **facts) for i in range(1, 6)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = draw_steps(tmp_path)
    assert path == tmp_path / "steps.png"
    assert path.read_bytes().startswith(PNG)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))  # too few
    assert draw_steps(tmp_path, target=tmp_path / "b.png") is None
    file.write_text("".join(json.dumps(metric_row(i, 0.1)) + "\n" for i in range(1, 6)))
    assert draw_steps(tmp_path, target=tmp_path / "b.png") is None  # a baseline's rows
    assert not (tmp_path / "b.png").exists()
