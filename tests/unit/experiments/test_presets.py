from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from common.config import RunConfig
from common.config.keys import to_toml
from common.errors import ConfigError
from experiments.run.presets import Preset, preset_names


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_preset_loads_and_says_what_it_shows() -> None:
    assert {"quickstart", "cifar100-sequential"} <= set(preset_names())
    for name in preset_names():
        preset = Preset.load(name)
        assert preset.name == name
        assert 20 < len(preset.description) < 100
        assert preset.config.client.num_partitions == preset.engine.num_clients


def test_sequential_preset_has_the_published_settings() -> None:
    preset = Preset.load("cifar100-sequential")
    config = preset.config
    assert (preset.engine.num_clients, config.run.rounds, config.client.models) == (50, 40, "cnn")
    assert (config.schedule.max_in_flight, config.schedule.buffer_size) == (1, 1)
    published = {
        "server-rule": "adam", "server-lr": 2e-4, "embedding-lr": 2e-4, "lr-decay-from": 1.0,
        "chunk-size": 3072, "embed-dim": 64, "hidden-dim": 128, "embedding-std": 0.002,
        "head-sharing": "chunks",
        "local-epochs": 1, "batch-size": 64, "learning-rate": 5e-3, "momentum": 0.9,
        "weight-decay": 5e-4, "client-clip-norm": 50.0, "training-precision": "float32",
        "clip-to-median": 0.0, "wire-precision": "float32", "uplink-top-k": 1.0,
        "partition": "pathological", "test-fraction": 0.25,
    }  # fmt: skip
    assert published.items() <= config.flat().items()


def test_file_has_the_form_of_a_preset(tmp_path: Path) -> None:
    text = 'description = "d"\n[engine]\nnum-clients = 3\n[config]\ndata-dir = "here"\nrounds = 2\n'
    preset = Preset.load(write(tmp_path, text))
    assert (preset.name, preset.description, preset.engine.num_clients) == ("mine", "d", 3)
    assert preset.config.client.data_dir == str(tmp_path / "here")
    assert preset.config.client.num_partitions == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[confg]\n", r"mine.toml: unknown table 'confg'. Did you mean 'config'\?"),
        ("[engine]\nnum-client = 3\n", r"mine.toml \[engine\]: unknown key 'num-client'. Did you"),
        ("[engine]\nnum-clients = 0\n", r"mine.toml \[engine\]: num-clients = 0 cannot be used"),
        ("[config]\nround = 3\n", r"mine.toml \[config\]: .*'round'. Did you mean 'rounds'\?"),
        ("[config]\nrounds = 0\n", r"mine.toml \[config\]: run config: rounds = 0 cannot be used"),
        ("config = 3\n", r"mine.toml: config must be a table: write \[config\]"),
        ("= 3\n", r"mine.toml is not a TOML file"),
    ],
)
def test_bad_file_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preset.load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", r"unknown preset 'quikstart'. Did you mean 'quickstart'"),
        ("nowhere.toml", r"cannot read .*nowhere.toml: No such"),
    ],
)
def test_a_preset_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preset.load(name)


def test_settings_reach_config_and_engine_with_their_types() -> None:
    texts = ["server-lr=1e-3", "rounds=3", "rounds=7", "workers=2", "num-clients=4"]
    quickstart = Preset.load("quickstart")
    preset = quickstart.with_settings([*texts, "run-name='a b'", "batch_size=32"])
    assert preset.config == RunConfig.parse(
        {
            **quickstart.config.flat(),
            "server-lr": 1e-3,
            "rounds": 7,  # the later one wins
            "num-partitions": 4,
            "run-name": "a b",
            "batch-size": 32,
        }
    )
    assert (preset.engine.workers, preset.engine.num_clients) == (2, 4)


def test_what_differs_from_a_preset_is_told() -> None:
    """A preset's description may no longer be true: its changes stand beside it."""
    preset = Preset.load("quickstart")
    same = f"rounds={preset.config.run.rounds}"
    asked = preset.with_settings(["method=local", "workers=1", same, "output-dir=x"])
    asked = asked.with_engine({"name": "inprocess", "num-clients": 4})
    changes = {"method": "local", "workers": 1, "num-clients": 4, "engine": "inprocess"}
    assert asked.changes_from(preset) == changes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("server-lrr=1", r"--set: unknown key 'server-lrr'. Did you mean 'server-lr'\?"),
        ("rounds", r"--set expects key=value, got 'rounds'"),
        ("rounds=many", r"run config: rounds = 'many' cannot be used"),
        ("method=fedsgd", r"run config: method = 'fedsgd' cannot be used"),
        ("workers=-1", r"engine: workers = '-1' cannot be used"),
        ("num-partitions=3", r"num-partitions cannot be set here: .*--clients N"),
    ],
)
def test_bad_setting_is_explained(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preset.load("quickstart").with_settings([setting])


def test_toml_is_what_flower_reads_back(tmp_path: Path) -> None:
    flat = RunConfig().flat() | {
        "run-name": 'quote " backslash \\ tab \t é 漢',
        "server-lr": 1e-5,
        "partition-options": '{"a": [1, 2]}',
    }
    path = tmp_path / "run-config.toml"
    path.write_text(to_toml(flat), encoding="utf-8")
    assert tomllib.loads(path.read_text(encoding="utf-8")) == flat
    assert parse_config_args([str(path)]) == flat
