"""A run's folder that somebody hands over: read, never run, and nothing is written beyond it."""

import json
from pathlib import Path

import pytest

from experiments.__main__ import main
from tests.support.tiny import HERE, run_tiny, tiny_config


def a_run(folder: Path) -> Path:
    config = tiny_config(folder, rounds=1, models=f"{HERE}:small", method="mh-pfedhn")
    run_tiny(config)
    return Path(config.run.output_dir)


def test_a_report_runs_nothing_that_a_run_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed or not: what a config calls its data is not called."""
    run = a_run(tmp_path)
    (tmp_path / "lies_about.py").write_text(
        "from pathlib import Path\ndef data():\n    (Path(__file__).parent / 'ran').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((run / "config.json").read_text())
    config |= {"dataset": "lies_about:data", "cache-dir": str(tmp_path / "elsewhere")}
    (run / "config.json").write_text(json.dumps(config))
    assert main(["report", str(run)]) == 0
    assert "not run here" in (run / "report.html").read_text()
    config |= {"dataset": "digits", "image-size": 2048}
    (run / "config.json").write_text(json.dumps(config))
    assert main(["report", str(run)]) == 0
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_written_about_a_run_stays_in_its_folder(tmp_path: Path) -> None:
    run, mine = a_run(tmp_path), tmp_path / "mine"
    mine.write_text("mine")
    (run / "tensorboard").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    names = ("report.html", "report.md", "clients.png")
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine)
    assert main(["report", str(run)]) == main(["show", str(run)]) == 0
    assert main(["track", str(run), "--to", "tensorboard"]) == 0
    assert mine.read_text() == "mine"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not [name for name in names if (run / name).is_symlink()]
