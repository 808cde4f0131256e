"""Augmentation, AdamW, a falling rate and label smoothing: every method, alone or batched."""

from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from tests.support.outputs import rows
from tests.support.tiny import HERE, tiny_config

RECIPE: dict[str, Any] = {
    "augmentation": "flip,crop",
    "optimizer": "adamw",
    "learning_rate": 0.003,
    "learning_rate_final": 0.1,
    "label_smoothing": 0.1,
}


def run(config: RunConfig, *, batched_clients: int = 0) -> list[dict[str, Any]]:
    run_inprocess(config, simulated_nodes(6), batched_clients=batched_clients)
    return rows(config)


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd"])
def test_batched_clients_follow_it(tmp_path: Path, method: str) -> None:
    settings = {
        **RECIPE,
        "method": method,
        "models": f"{HERE}:small,{HERE}:wide",
        "rounds": 3,
        "max_in_flight": 0,
        "buffer_size": 0,
    }
    alone = run(tiny_config(tmp_path / "a", **settings))
    again = run(tiny_config(tmp_path / "b", **settings))
    batched = run(tiny_config(tmp_path / "c", **settings), batched_clients=6)
    for one, same, other in zip(alone, again, batched, strict=True):
        for key in ("accuracy_micro", "train_loss", "test_loss"):
            assert same[key] == one[key], key
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize(
    "method",
    ["mh-pfedhn", "mh-pfedhn-gd", "local", "fedavg", "fedprox", "fml", "fedproto", "fd", "pfedhn"],
)
def test_each_part_reaches_every_method(tmp_path: Path, method: str) -> None:
    one_by_one = method in ("mh-pfedhn", "pfedhn")
    slots = {"max_in_flight": int(one_by_one), "buffer_size": int(one_by_one)}

    def losses(name: str, **recipe: Any) -> list[float]:
        settings = {"method": method, "models": f"{HERE}:small", "pfedhn_batches": 3}
        found = run(tiny_config(tmp_path / name, **settings, **slots, **recipe))
        return [row["train_loss"] for row in found]

    first, last = losses("plain")
    falling = losses("falling", learning_rate_final=0.01)
    assert falling[0] == first  # the first round has the whole rate
    assert falling[1] != last
    for key in ("augmentation", "optimizer", "label_smoothing"):
        assert losses(key, **{key: RECIPE[key]})[0] != first, key
