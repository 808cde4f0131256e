from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from common.config import RunConfig
from common.errors import ConfigError
from experiments.run.engines.home import own_modules
from experiments.run.launch import batched_clients, complete, error_lines, launch
from experiments.run.presets import EngineSection, Preset
from tests.support.tiny import HERE, tiny_config

FLOWER_LOG = """\
\x1b[92mINFO \x1b[0m:      round 1/5  accuracy 0.192
\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
\x1b[93mWARNING \x1b[0m:   Rejected: delta of client 3 is not finite
Traceback (most recent call last):
  File "strategy.py", line 3, in start
    raise RunError("too few")
common.errors.RunError: too few
\x1b[91mERROR \x1b[0m:     Exit Code: 700
"""


def test_error_lines_tell_the_story_without_the_noise(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(FLOWER_LOG)
    assert error_lines(log) == [
        "WARNING :   Rejected: delta of client 3 is not finite",
        "common.errors.RunError: too few",
    ]


def test_error_lines_of_a_silent_death_are_the_last_ones(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("".join(f"line {i}\n" for i in range(20)))
    assert error_lines(log, limit=2) == ["line 18", "line 19"]
    assert error_lines(tmp_path / "none.log") == []


def test_launch_fills_in_folder_name_and_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MH_PFEDHN_RUNS", str(tmp_path))
    config = complete(Preset.load("cifar100-sequential")).config
    assert Path(config.run.output_dir).parent == tmp_path
    assert config.run.run_name == "cifar100-sequential"
    assert config.schedule.min_clients == 50


def test_a_users_own_modules_are_offered_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/before")
    path = os.pathsep.join(["/before", str(tmp_path)])
    assert own_modules(["cnn", "mine:net"], tmp_path) == {"PYTHONPATH": path}
    assert own_modules(["cnn", "digits"], tmp_path) == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("global-model=cn", "unknown model 'cn'. Did you mean 'cnn'?"),
        ("models=tests.support.tiny:smal", "tiny.py has nothing under 'smal'"),
        ("models=nowhere:net", "cannot import 'nowhere'"),
        ("max-parameters=100", "model 'tests.support.tiny:small' has 172 parameters here; the ser"),
        ("device=cuda:9", "device = 'cuda:9', but "),
        ("device=gpu", "device = 'gpu' is no torch device"),
        ("partition=dirichlett", "Did you mean 'dirichlet'?"),
    ],
)
def test_a_client_that_could_not_start_fails_the_launch_at_once(
    tmp_path: Path, setting: str, message: str
) -> None:
    """Without this the server would wait for clients until wait-for-clients-s, 300 s, is over."""
    config = tiny_config(tmp_path, models=f"{HERE}:small", method="mh-pfedhn-gd").flat()
    del config["num-partitions"], config["output-dir"]
    preset = Preset("tiny", "", EngineSection(name="inprocess"), RunConfig()).with_config(config)
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    preset = preset.with_settings([setting, f"output-dir={tmp_path}/run", "wait-for-clients-s=300"])
    assert launch(preset, console) == 1
    console.file.close()
    assert not (tmp_path / "run" / "config.json").exists()  # no server was started
    assert message in console.export_text()
    assert message in json.loads((tmp_path / "run" / "summary.json").read_text())["reason"]


def test_absent_clients_are_not_waited_for_and_need_the_inprocess_engine(tmp_path: Path) -> None:
    preset = Preset.load("paper-a-cifar10").with_settings(
        ["absent-clients=3", f"output-dir={tmp_path / 'run'}"]
    )
    assert complete(preset).config.schedule.min_clients == 7
    with pytest.raises(ConfigError, match="absent-clients = 3 needs engine 'inprocess'"):
        complete(preset.with_engine({"name": "ray"}))


@pytest.mark.parametrize(
    ("engine", "settings", "expected"),
    [
        ({}, {}, 8),
        ({"batched-clients": 3}, {"max-in-flight": 1}, 3),
        ({"batched-clients": 0}, {}, 0),
        ({"workers": 2}, {}, 0),
        ({}, {"max-in-flight": 1}, 0),
        ({}, {"method": "fedavg"}, 0),
        ({}, {"dp-noise": 1.0}, 0),
        ({}, {"device": "cpu"}, 0),
    ],
)
def test_clients_are_batched_where_several_fill_a_gpu(
    engine: dict[str, int],
    settings: dict[str, str | int],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    section = EngineSection.model_validate({"num-clients": 8} | engine)
    config = RunConfig().with_overrides({"max-in-flight": 4} | settings)
    assert batched_clients(section, config) == expected
