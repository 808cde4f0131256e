"""`mh-pfedhn new`: a folder whose files, and whose notebook, run as they stand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.deploy.settings import JoinSettings
from experiments.run.presets import Preset, read_toml


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_site", raising=False)
    made = tmp_path / "mine"
    assert main(["new", str(made)]) == 0
    assert "mh-pfedhn run simulate.toml" in capsys.readouterr().out
    monkeypatch.chdir(made)
    return made


def test_the_notebook_runs_cell_by_cell(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    book = json.loads((folder / "tutorial.ipynb").read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    text = (folder / "simulate.toml").read_text()
    (folder / "simulate.toml").write_text(text.replace("rounds = 10", "rounds = 2"))
    space: dict[str, Any] = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec(cell["source"], space)
    out = capsys.readouterr().out
    assert f"{space['rows'][-1]['accuracy_alone']:.3f}" in out
    assert "test examples" in out
    assert space["picture"].size[0] > 300
    assert space["model"].training is False


def test_its_files_are_a_site_and_a_simulation(folder: Path) -> None:
    preset = Preset.load(str(folder / "simulate.toml"))
    assert preset.engine.num_clients == 10
    assert "my_site:small_net" in preset.config.client.models
    values = read_toml(folder / "my_site.toml") | {"server": "x:1", "insecure": True}
    values.pop("bundle")
    assert JoinSettings.parse(values, folder).client_id == "hospital-a"


def test_what_is_there_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my_site.py").write_text("# mine")
    assert main(["new", str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (folder / "my_site.py").read_text() == "# mine"
