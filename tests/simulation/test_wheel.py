"""The wheel by itself: built, installed beside the dependencies, run outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).parents[2]
UV = shutil.which("uv")


def install(folder: Path) -> Path:
    """Make an environment with the wheel and, by path alone, what is installed here."""
    subprocess.run([str(UV), "build", "-q", "--wheel", "-o", folder, PROJECT_ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    command = [str(UV), "pip", "install", "-q", "--no-deps", "--offline", "--python", python, wheel]
    subprocess.run(command, check=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # The path of a .pth file is added, the .pth files in it are not: no editable install shadows.
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib"))
    for program in Path(sys.executable).parent.glob("fl*"):  # Flower's, run by this Python
        copy = python.with_name(program.name)
        copy.write_text(f"#!{python}\n" + program.read_text().partition("\n")[2])
        copy.chmod(0o755)
    return python


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="uv, which builds the wheel, is not installed here")
def test_an_installed_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    python, here = install(tmp_path), tmp_path / "empty"
    here.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [python.with_name("mh-pfedhn"), *words]
        return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)

    for engine in ("inprocess", "ray"):
        words = ("run", "quickstart", "--rounds", "1", "--clients", "2", "--engine", engine)
        done = run(*words, "--output-dir", engine)
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads((here / engine / "summary.json").read_text())
        assert summary["status"] == "completed"
    bench = run("bench", "--quick")
    assert bench.returncode == 2
    assert "benchmarks are not part of the installed package" in bench.stderr
