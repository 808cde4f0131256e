from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from common.config import RunConfig
from experiments.run.engines import processes
from experiments.run.engines.home import (
    child_environment,
    new_home,
    remove_abandoned_homes,
    stage_app,
)
from experiments.run.engines.superlink import RayEngine, available_cpus, parse_status
from experiments.run.presets import EngineSection

PROJECT = Path(__file__).parents[3]


def test_children_are_isolated_marked_and_quiet(tmp_path: Path) -> None:
    base = {"PATH": "/bin", "FLWR_HOME": "/theirs", "NO_PROXY": "corp"}
    env = child_environment(base, home=tmp_path)
    assert env[processes.MARK] == env["FLWR_HOME"] == env["RAY_TMPDIR"] == str(tmp_path)
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["NO_PROXY"] == "corp,127.0.0.1,localhost"
    assert env["PATH"].split(":") == [str(Path(sys.executable).parent), "/bin"]
    assert base["FLWR_HOME"] == "/theirs"


def test_a_cluster_keeps_its_address_and_its_files(tmp_path: Path) -> None:
    env = child_environment({"RAY_ADDRESS": "10.0.0.7:6379"}, home=tmp_path)
    assert env["RAY_ADDRESS"] == "10.0.0.7:6379"
    assert "RAY_TMPDIR" not in env


def test_bytecode_is_kept_elsewhere_where_it_may_not_lie_beside_the_sources(tmp_path: Path) -> None:
    base = {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": "/cache"}
    env = child_environment(base, home=tmp_path)
    assert env["PYTHONDONTWRITEBYTECODE"] == ""
    assert env["PYTHONPYCACHEPREFIX"] == "/cache/mh-pfedhn/bytecode"
    assert "PYTHONPYCACHEPREFIX" not in child_environment({}, home=tmp_path)


def test_the_staged_app_holds_the_packages_and_every_key(tmp_path: Path) -> None:
    stage_app(tmp_path / "app")
    names = {path.name for path in (tmp_path / "app").iterdir()}
    assert names == {"pyproject.toml", "server_app", "client_app", "common"}
    assert not list((tmp_path / "app").rglob("__pycache__"))
    flower = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flower["config"] == dict(RunConfig().flat())
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert flower["components"] == project["tool"]["flwr"]["app"]["components"]


@pytest.mark.parametrize(
    ("stdout", "status"),
    [
        ('note\n{"runs": [{"status": "finished:completed"}]}', "finished:completed"),
        ('{"runs": [{"status": "finished:failed"}]}', "finished:failed"),
        ('{"runs": []}', "unknown"),
        ('{"success": false, "error-message": "no"}', "unknown"),
        ("", "unknown"),
    ],
)
def test_status_comes_from_flowers_own_words(stdout: str, status: str) -> None:
    assert parse_status(stdout) == status


@pytest.mark.parametrize(
    ("engine", "cpus"),
    [
        (EngineSection(num_clients=10, workers=3), 3),
        (EngineSection(num_clients=10, workers=3, client_cpus=2), 6),
        (EngineSection(num_clients=2, workers=8), 2),
        (EngineSection(num_clients=100), available_cpus()),
        (EngineSection(num_clients=100, client_cpus=1000), 1000),
    ],
)
def test_federation_has_room_for_the_workers_and_no_more(
    tmp_path: Path, engine: EngineSection, cpus: int
) -> None:
    settings = RayEngine(engine, log=tmp_path / "log").federation()
    assert f"num-supernodes={engine.num_clients}" in settings
    assert f"client-resources-num-cpus={engine.client_cpus}" in settings
    assert settings.endswith(f"init-args-num-cpus={cpus}")


def test_a_cluster_brings_its_own_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # Ray takes no num-cpus together with an address
    settings = RayEngine(EngineSection(num_clients=9, workers=3), log=tmp_path / "log").federation()
    assert settings.endswith("client-resources-num-gpus=0.0")


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 1), ("max 100000", None), ("", None)])
def test_a_containers_quota_counts(tmp_path: Path, quota: str, cpus: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    everything = available_cpus(tmp_path / "missing")
    assert available_cpus(tmp_path / "cpu.max") == (cpus or everything)


def test_leaving_the_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    with RayEngine(EngineSection(), log=tmp_path / "run.log") as engine:
        home = engine.home
        assert (home / "app" / "pyproject.toml").is_file()
    assert not home.exists()
    assert processes.stop_marked(str(home)) == 0


def test_what_a_killed_command_line_left_is_removed(tmp_path: Path) -> None:
    abandoned, mine = new_home(), new_home()
    (abandoned / "owner").write_text("999999999")  # no such process
    env = {**os.environ, processes.MARK: str(abandoned)}
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    orphan = processes.start(command, env=env, log=tmp_path / "log", cwd=tmp_path)
    try:
        remove_abandoned_homes()
        orphan.wait(5)
        assert not abandoned.exists()
        assert mine.exists()
    finally:
        orphan.kill()
        shutil.rmtree(mine)
