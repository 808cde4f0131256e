from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.errors import RunError
from experiments.report.clients import draw_clients
from experiments.report.runs import Run
from server_app.output.curves import Reference, draw_curves
from server_app.output.figures import BLUE, ORANGE, draw_steps
from tests.unit.experiments.run_folders import metric_row, write_run, write_seed

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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, instead of files."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: found.append(figure))
    return found


def test_curves_and_gains_are_shown_where_there_are_several_predictors(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    others = {"accuracy_own": 0.3, "accuracy_common": 0.35, "accuracy_alone": 0.2}
    draw_curves(write_seed(tmp_path / "a", row=others, alone=(0.4, 0.5, 0.9, 0.8)))
    draw_curves(write_seed(tmp_path / "b", method="fedproto", row={"accuracy_head": 0.3}))
    draw_curves(write_seed(tmp_path / "c"))
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in drawn]
    every = "Test accuracy, all examples"
    assert titles == [
        [every, "What joining is worth", "Loss", "Traffic so far"],
        [every, "Loss", "Traffic so far"],
        ["Test accuracy", "Loss", "Traffic so far"],
    ]
    curves, gains = drawn[0].axes[:2]
    said = [text.get_text() for text in curves.texts]
    assert said == ["predictor 40.0", "common 35.0", "own 30.0", "alone 20.0"]
    widths = [line.get_linewidth() for line in curves.lines]
    assert max(widths) == widths[-1] > widths[0]
    assert gains.get_title(loc="right") == "2 of 4 gain"
    bars = [bar for bar in gains.patches if isinstance(bar, Rectangle) and bar.get_height()]
    colours = {bar.get_x() < 0: bar.get_facecolor()[:3] for bar in bars if bar.get_width() > 4}
    assert colours == {False: to_rgb(BLUE), True: to_rgb(ORANGE)}


def test_the_way_from_alone_is_shown_for_each_client(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_clients(Run.load(write_seed(tmp_path / "a", alone=(0.4, 0.5, 0.9, 0.7))))
    lines = drawn[0].axes[0].lines
    ways = [[*map(round, line.get_ydata())] for line in lines if len(line.get_xdata()) == 2]
    assert ways[:4] == [[40, 50], [50, 60], [90, 70], [70, 80]]
