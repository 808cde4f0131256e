"""New clients join a running federation, or a finished one whose trunk and heads are frozen."""

from pathlib import Path

import pytest
import torch

from common.config import RunConfig
from common.errors import ConfigError, RunError
from experiments.run.engines.inprocess import simulated_nodes
from tests.support.attendance import attended_by
from tests.support.outputs import client_rows, rows, tensors
from tests.support.tiny import HERE, MIXED, run_tiny, tiny_config


def config_at(folder: Path, **overrides: object) -> RunConfig:
    settings: dict[str, object] = {
        "rounds": 12,
        "max_in_flight": 0,
        "buffer_size": 0,
        "server_lr": 0.01,
        "embedding_lr": 0.03,
        "distill_alpha": 0.05,
        "state_dir": str(folder / "state"),
        **overrides,
    }
    return tiny_config(folder, **settings)


def novel(config: RunConfig, folder: Path, rounds: int) -> RunConfig:
    return config.with_overrides(
        {
            "resume-from": config.run.output_dir,
            "output-dir": str(folder),
            "novel-only": True,
            "rounds": rounds,
        }
    )


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters of the first checkpoint that are not bitwise the same."""
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def accuracies(config: RunConfig) -> dict[str, float]:
    return {row["client_id"]: float(row["accuracy"]) for row in client_rows(config)}


@pytest.mark.parametrize(
    ("method", "rule", "models"),
    [
        ("mh-pfedhn", "adam", MIXED),
        ("mh-pfedhn-gd", "adam", MIXED),
        ("mh-pfedhn", "kernel", f"{HERE}:small"),  # two of a size would share nothing
    ],
)
def test_only_embeddings_of_new_clients_learn(
    tmp_path: Path, method: str, rule: str, models: str
) -> None:
    nodes = simulated_nodes(6)
    base = config_at(tmp_path, method=method, server_rule=rule, models=models)
    run_tiny(base, node_configs=[nodes[i] for i in (0, 2, 4)])
    config = novel(base, tmp_path / "novel", rounds=24)
    run_tiny(config, node_configs=nodes)
    before, after = tensors(base), tensors(config)
    assert moved(before, after) == set()  # neither a parameter nor its optimiser state
    new = {name for name in after if name not in before and not name.startswith("adam.")}
    assert {name for name in new if after[name].any()} == {f"embeddings.{i}" for i in "135"}
    assert rows(config)[-1]["num_accepted"] == 3
    found = accuracies(config)
    assert found.keys() == {str(i) for i in range(6)}  # everybody is evaluated
    assert sum(found[i] for i in "135") / 3 > 0.8


def test_a_new_size_gets_a_head_group_that_learns(tmp_path: Path) -> None:
    nodes = simulated_nodes(6)
    base = config_at(tmp_path)
    run_tiny(base, node_configs=nodes[2:])
    config = novel(base, tmp_path / "novel", rounds=24)
    run_tiny(config, node_configs=nodes)
    before, after = tensors(base), tensors(config)
    assert moved(before, after) == set()
    new = {name for name in after if name not in before and not name.startswith("adam.")}
    assert new == {"embeddings.0", "embeddings.1", "heads.3.weight", "heads.3.bias"}
    assert after["adam.step.heads.3.weight"].item() == 12
    found = accuracies(config)
    assert (found["0"] + found["1"]) / 2 > 0.8


def test_a_novel_only_run_resumes_with_the_same_clients_frozen(tmp_path: Path) -> None:
    nodes = simulated_nodes(6)
    base = config_at(tmp_path, rounds=2, checkpoint_every=1)
    run_tiny(base, node_configs=nodes[:5])
    config = novel(base, tmp_path / "novel", rounds=3)
    run_tiny(config, node_configs=nodes)
    further = config.with_overrides({"resume-from": config.run.output_dir, "rounds": 4})
    run_tiny(further, node_configs=nodes)
    assert moved(tensors(base), tensors(further)) == set()
    assert tensors(further)["adam.step.embeddings.5"].item() == 2


def test_a_client_joins_a_running_federation(tmp_path: Path) -> None:
    config = config_at(tmp_path, rounds=4, checkpoint_every=1)
    plan = attended_by(lambda server_round: range(5 if server_round <= 2 else 6))
    run_tiny(config, grid_type=plan)
    assert [row["num_accepted"] for row in rows(config)] == [5, 5, 6, 6]
    assert tensors(config)["adam.step.embeddings.5"].item() == 2


def test_nothing_to_freeze_and_nobody_new_are_clear_errors(tmp_path: Path) -> None:
    base = config_at(tmp_path, rounds=1)
    with pytest.raises(ConfigError, match=r"there is nothing to freeze\. Set resume-from"):
        run_tiny(base.with_overrides({"novel-only": True}))
    run_tiny(base)
    with pytest.raises(RunError, match="all 6 clients that are present are part of the checkpoint"):
        run_tiny(novel(base, tmp_path / "novel", rounds=2))


def test_a_novel_only_run_without_rounds_left_says_so(tmp_path: Path) -> None:
    nodes = simulated_nodes(3)
    base = config_at(tmp_path)
    run_tiny(base, node_configs=nodes[:2])
    config = novel(base, tmp_path / "novel", rounds=base.run.rounds)
    with pytest.raises(
        ConfigError, match=r"no round is left\. rounds counts from the very beginning"
    ):
        run_tiny(config, node_configs=nodes)
