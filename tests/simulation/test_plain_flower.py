"""The README's other command: plain `flwr run .`, with nothing of this project's command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.run.engines import processes
from experiments.run.engines.home import child_environment, new_home
from experiments.run.engines.superlink import parse_status

PROJECT_ROOT = Path(__file__).parents[2]
FLWR = Path(sys.executable).parent / "flwr"


@pytest.fixture
def home() -> Iterator[Path]:
    """A FLWR_HOME short enough for Ray's sockets, which pytest's own folders are not."""
    folder = new_home()
    yield folder
    processes.stop_marked(str(folder))
    shutil.rmtree(folder)


@pytest.mark.slow
def test_flwr_run_dot_stream_completes(tmp_path: Path, home: Path) -> None:
    """Flower starts its managed SuperLink for this; the fixture ends it, as nothing else would."""
    env = child_environment(os.environ, home=home)
    env |= {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(processes.free_port()),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    settings = f'rounds=2 output-dir="{tmp_path}/run" cache-dir="{tmp_path}/cache"'
    command = [FLWR, "run", ".", "--stream", "--federation-config", "num-supernodes=2"]
    done = subprocess.run(
        [*command, "--run-config", settings],
        cwd=PROJECT_ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    listed = subprocess.run(
        [FLWR, "ls", "--format", "json"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert parse_status(listed.stdout) == "finished:completed", done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["round"], row["num_accepted"]) for row in rows] == [(1, 2), (2, 2)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert "round 2/2  accuracy" in done.stdout
