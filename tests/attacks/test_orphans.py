"""kill -9 of what somebody started by hand takes along everything that it started."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from experiments.run.engines.processes import is_alive
from tests.deployment.test_join_loopback import settings_file
from tests.support.deployment import REPOSITORY, Deployment, wait_until
from tests.support.tiny import PRESET

OWNER = "MH_PFEDHN_TEST_OWNER"
GONE_WITHIN_S = 10.0


def started_under(owner: str) -> list[psutil.Process]:
    """Every living process that inherited the test's own environment variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(OWNER) == owner and is_alive(process):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def start(
    command: list[str], owner: str, env: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments", *command],
            env={**env, OWNER: owner}, cwd=REPOSITORY, stdin=subprocess.DEVNULL,
            stdout=sink, stderr=subprocess.STDOUT,
        )  # fmt: skip


def kill_and_look(process: subprocess.Popen[bytes], owner: str) -> None:
    process.kill()
    process.wait()
    wait_until(lambda: not started_under(owner), GONE_WITHIN_S, "everything has ended")


def test_kill_9_of_join_ends_its_supernode(tmp_path: Path) -> None:
    owner = f"join-{os.getpid()}"
    with Deployment(tmp_path, ["site-a"]) as deployment:
        deployment.start_superlink()
        deployment.register("site-a")
        command = ["join", str(settings_file(deployment, "site-a"))]
        process = start(command, owner, deployment.environment("site-a"), tmp_path / "join.log")

        def serves() -> bool:
            lines = [" ".join(found.cmdline()) for found in started_under(owner)]
            return any("deploy.supernode" in line for line in lines) and len(lines) > 3

        wait_until(serves, 90, "the SuperNode and its SuperExec run")
        kill_and_look(process, owner)


def test_kill_9_of_a_run_on_ray_ends_all_of_ray(tmp_path: Path) -> None:
    owner = f"ray-{os.getpid()}"
    preset = tmp_path / "tiny.toml"
    preset.write_text(PRESET.replace('name = "inprocess"\n', "").replace("workers = 1\n", ""))
    folder = tmp_path / "run"
    command = ["run", str(preset), "--rounds", "1000", "--output-dir", str(folder)]
    process = start(command, owner, dict(os.environ), tmp_path / "run.log")
    wait_until((folder / "metrics.jsonl").exists, 120, "a round is done")
    assert len(started_under(owner)) > 5
    kill_and_look(process, owner)
