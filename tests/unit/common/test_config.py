import tomllib
from pathlib import Path

import pytest

from common.config import NodeConfig, RunConfig
from common.errors import ConfigError
from experiments.run.presets import Preset

ROOT = Path(__file__).parents[3]


def test_flat_and_parse_are_inverse() -> None:
    config = RunConfig.parse({"rounds": 3, "models": "cnn,mlp"})
    assert RunConfig.parse(config.flat()) == config
    assert config.run.rounds == 3


def test_pyproject_has_exactly_the_keys_of_the_code() -> None:
    # Flower lets a user override only keys that stand in pyproject.toml.
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert table.keys() == RunConfig.key_names()
    assert RunConfig.parse(table).flat() == table


def test_plain_flwr_run_is_the_quickstart() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert Preset.load("quickstart").config == RunConfig.parse(table) == RunConfig()


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"rouns": 3}, "unknown key 'rouns'. Did you mean 'rounds'?"),
        ({"rounds": 0}, "run config: rounds = 0 cannot be used: Input should be greater than"),
        ({"rounds": "many"}, "run config: rounds = 'many' cannot be used"),
        (
            {"method": "fedavgg"},
            "method = 'fedavgg' cannot be used: Value error, unknown method 'fed",
        ),
        ({"min-fraction": 1.5}, "min-fraction = 1.5 cannot be used"),
    ],
)
def test_bad_run_config_names_key_value_and_remedy(flat: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(flat)
    assert message in str(caught.value)


def test_bad_node_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data-dri'. Did you mean 'data-dir'\?"):
        NodeConfig.parse({"client-id": "a", "data-dri": "x"})
    with pytest.raises(ConfigError, match=r"set client-id \(a stable name"):
        NodeConfig.parse({"model": "cnn"})


def test_local_declarations_win_and_the_run_config_fills_in() -> None:
    run = RunConfig.parse({"models": "cnn,mlp", "dataset": "cifar10", "device": "cuda"})
    node = NodeConfig.parse({"client-id": "site-a", "model": "my:net", "device": "cpu"})
    section = node.client_section(run)
    assert (section.models, section.dataset, section.device) == ("my:net", "cifar10", "cpu")
    assert node.identity == "site-a"


def test_cap_on_examples_is_the_clients_own_to_set() -> None:
    run = RunConfig.parse({"max-client-examples": 200})
    node = NodeConfig.parse({"client-id": "a", "max-client-examples": 50})
    assert node.client_section(run).max_client_examples == 50
    assert NodeConfig.parse({"client-id": "b"}).client_section(run).max_client_examples == 200
    with pytest.raises(ConfigError, match="max-client-examples = -1 cannot be used"):
        RunConfig.parse({"max-client-examples": -1})


def test_simulated_node_is_its_partition() -> None:
    node = NodeConfig.parse({"partition-id": 3, "num-partitions": 7})
    assert node.identity == "3"
    assert node.client_section(RunConfig()).num_partitions == 7


def test_keys_of_different_sections_go_together() -> None:
    with pytest.raises(ConfigError, match=r"embedding-std = 0\.002 .* Set embedding-std = 1\.0"):
        RunConfig.parse({"embedding-std": 0.002})
    with pytest.raises(ConfigError, match=r"models of zeros.*theta-offset = 'init'"):
        RunConfig.parse({"theta-offset": "none"})
    with pytest.raises(ConfigError, match="absent-clients = 10 of 10 clients leaves nobody"):
        RunConfig.parse({"absent-clients": 10})
    RunConfig.parse({"server-rule": "least-squares", "embedding-std": 1.0, "absent-clients": 9})


STILL = {"server-rule": "least-squares", "server-lr": 0, "embedding-lr": 0, "embedding-std": 1}


def test_somebody_has_to_learn() -> None:
    with pytest.raises(ConfigError, match=r"server-lr = 0 .* no head would ever learn"):
        RunConfig.parse({"server-rule": "adam", "server-lr": 0})
    with pytest.raises(ConfigError, match="novel-only with embedding-lr = 0"):
        RunConfig.parse({**STILL, "novel-only": True})
    with pytest.raises(ConfigError, match=r"novel-only with embedding-lr = 0.0002: .*Set"):
        RunConfig.parse({"novel-only": True})
    RunConfig.parse({"embedding-std": 1.0, "novel-only": True, "embedding-lr": 0.03})
    RunConfig.parse(STILL)
