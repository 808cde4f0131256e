"""What the operator of a run sees of its participants, in the terminal and on a page."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.deploy.attendance import drawn_run, run_status
from experiments.deploy.status import write_page
from tests.support.tiny import run_tiny, tiny_config, trusting

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two participants, and of a third that takes the name of one of them."""
    folder = tmp_path_factory.mktemp("status")
    config = tiny_config(
        folder, method="mh-pfedhn-pg", server_rule="kernel", rounds=2,
        validation_fraction=0.1, measure_alone=True,
    )  # fmt: skip
    own = trusting(folder, "tests.support.tiny:small")
    names = ("<b>site<b>", "site-b", "site-b")
    nodes: list[Any] = [
        {"client-id": name, "partition-id": i, **own} for i, name in enumerate(names)
    ]
    run_tiny(config, node_configs=nodes)
    return folder / "run"


def test_the_operator_sees_everybody(run: Path, capsys: Capture) -> None:
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["round"], found["status"]) == (2, "completed")
    assert [row["client_id"] for row in found["participants"]] == ["<b>site<b>", "site-b"]
    for row in found["participants"]:
        assert row["online"] is True
        assert row["last_reply"] == 2
        assert float(row["accuracy_alone"]) >= 0
    (reason,) = found["refused"]
    assert "site-b" in reason
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    for words in ("round 2", "gain", "last reply", "refused: "):
        assert words in text


def test_there_is_a_page_that_loads_itself_anew(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "status.html"
    assert main(["status", str(run), "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "refresh" not in text, "it is of one moment"
    write_page(drawn_run(run_status(run)), page, "run", again=True)
    text = page.read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="2">' in text
    assert "<b>site<b>" not in text
    assert "&lt;b&gt;site&lt;b&gt;" in text
    assert "script" not in text


def test_a_damaged_run_is_named(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is no participant's folder" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text((run / "summary.json").read_text())
    assert main(["status", str(tmp_path)]) == 0
    assert "completed, round 0" in capsys.readouterr().out, "before the first round"
    (tmp_path / "attendance.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run that can be read" in capsys.readouterr().err
