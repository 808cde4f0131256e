import json
import tomllib
from pathlib import Path

import pytest

from common.config import NodeConfig, RunConfig
from common.config.keys import config_table, json_schema, run_keys
from common.errors import ConfigError
from experiments.__main__ import main

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_flat_and_parse_are_inverse() -> None:
    config = RunConfig.parse({"rounds": 3, "models": "cnn,mlp"})
    assert RunConfig.parse(config.flat()) == config
    assert config.run.rounds == 3


def test_pyproject_has_the_defaults() -> None:
    # Flower lets a user override only keys that stand in pyproject.toml.
    text = PYPROJECT.read_text()
    assert text.endswith(config_table()), "python -m experiments keys --toml writes the table"
    table = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert table == RunConfig().flat()


def test_every_key_says_what_it_is() -> None:
    assert {key.name for key in run_keys()} == RunConfig.key_names()
    assert len(run_keys()) == len(RunConfig.key_names())
    assert [key.name for key in run_keys() if len(key.meaning) < 10 or not key.kind] == []
    schema = json_schema()
    assert schema["properties"].keys() == RunConfig.key_names()
    assert schema["properties"]["min-fraction"]["maximum"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["server-lr"], ["0.0002", "number >= 0", "Adam's rate of trunk and heads"]),
        (["head_sharing"], ["chunks | tolerance | tag | own"]),
        (["round-deadline-s"], ["unit         s", "every run"]),
        (["head-tag", "--node"], ["the server sees a hash of it"]),
        ([], ["hypernetwork", "personal-gain", "batched-clients"]),
        (["--json-schema"], ['"additionalProperties": false']),
        (["--toml"], ["[tool.flwr.app.config]"]),
    ],
)
def test_keys_are_printed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["keys", *arguments]) == 0
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []
    if "--json-schema" in arguments:
        assert json.loads(printed) == json_schema()


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "server-lrr"]) == 2
    assert "unknown key 'server-lrr'. Did you mean 'server-lr'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"rouns": 3}, r"unknown key 'rouns'\. Did you mean 'rounds'\?"),
        ({"rounds": 0}, "run config: rounds = 0 cannot be used: Input should be greater than"),
        ({"rounds": "many"}, "run config: rounds = 'many' cannot be used"),
        ({"method": "fedavgg"}, "method = 'fedavgg' cannot be used: .*'fedavg'"),
        ({"max-delta-norm": float("inf")}, "max-delta-norm = inf cannot be used"),
        ({"min-fraction": 1.5}, r"min-fraction = 1\.5 cannot be used"),
        ({"max-client-examples": -1}, "max-client-examples = -1 cannot be used"),
        # keys of different sections that do not go together
        ({"validation-fraction": 0.3}, "validation-fraction = 0.3 .* nothing to test on"),
        ({"method": "mh-pfedhn-pg", "validation-fraction": 0}, "validation-fraction = 0 leaves"),
        ({"absent-clients": 10}, "absent-clients = 10 of 10 clients leaves nobody"),
        ({"server-rule": "adam", "server-lr": 0}, "server-lr = 0 .* no head would ever learn"),
        (
            {"server-rule": "adam", "embedding-lr": 0, "novel-only": True},
            "novel-only with embedding-lr = 0",
        ),
        (
            {"server-rule": "adam", "novel-only": True},
            "novel-only with embedding-lr = 0.0002: .*Set",
        ),
    ],
)
def test_bad_run_config_names_key_value_and_remedy(flat: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(flat)


def test_what_goes_together_is_accepted() -> None:
    RunConfig.parse({"absent-clients": 9})
    RunConfig.parse({"novel-only": True, "embedding-lr": 0.03})
    RunConfig.parse({"server-lr": 0, "embedding-lr": 0})
    RunConfig.parse({"head-sharing": "tolerance"})


def test_bad_node_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data-dri'. Did you mean 'data-dir'\?"):
        NodeConfig.parse({"client-id": "a", "data-dri": "x"})
    with pytest.raises(ConfigError, match=r"set client-id \(a stable name"):
        NodeConfig.parse({"model": "cnn"})


def test_local_declarations_win_and_the_run_config_fills_in() -> None:
    run = RunConfig.parse({"models": "cnn,mlp", "dataset": "cifar10", "max-client-examples": 200})
    node = NodeConfig.parse({"client-id": "site-a", "model": "my:net", "max-client-examples": 50})
    section = node.client_section(run.client)
    assert (section.models, section.dataset, section.max_client_examples) == (
        "my:net", "cifar10", 50,
    )  # fmt: skip
    assert node.identity == "site-a"
    assert (
        NodeConfig.parse({"client-id": "b"}).client_section(run.client).max_client_examples == 200
    )


def test_simulated_node_is_its_partition() -> None:
    node = NodeConfig.parse({"partition-id": 3, "num-partitions": 7})
    assert node.identity == "3"
    assert node.client_section(RunConfig().client).num_partitions == 7
