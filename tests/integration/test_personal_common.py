"""MH-pFedHN-PG, and the model trained alone beside any method, in whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import RunConfig
from common.files import read_json
from experiments.run.engines.inprocess import simulated_nodes
from tests.support.close import assert_all_equal
from tests.support.outputs import checkpoints, client_rows, rows, summary
from tests.support.tiny import patterns, run_tiny, tiny_config, trusting

PREDICTORS = ("own", "common", "alone")


def personal_common(tmp_path: Path, **settings: Any) -> RunConfig:
    wanted = {"method": "mh-pfedhn-pg", "validation_fraction": 0.1, "measure_alone": True}
    return tiny_config(tmp_path, **{**wanted, "max_in_flight": 0, "buffer_size": 0, **settings})


@pytest.mark.parametrize("evaluation", ["separate", "fused"])
def test_every_predictor_is_measured_in_every_round(tmp_path: Path, evaluation: str) -> None:
    config = personal_common(tmp_path, rounds=3, evaluation=evaluation)
    run_tiny(config)
    for row in rows(config):
        assert all(0 <= row[f"accuracy_{name}"] <= 1 for name in PREDICTORS)
        assert 0 <= row["share_gaining"] <= 1
        assert row["num_updates"] == 12  # of six clients, two models each
    for client in client_rows(config):
        assert all(0 <= float(client[f"accuracy_{name}"]) <= 1 for name in PREDICTORS)
        better = float(client["accuracy"]) - float(client["accuracy_alone"])
        assert float(client["gain"]) == pytest.approx(better)
    found, last = summary(config), rows(config)[-1]
    assert found["gain"] == pytest.approx(last["accuracy_micro"] - last["accuracy_alone"])
    assert found["num_measured"] == 6
    assert found["num_gaining"] == 6 * last["share_gaining"]


def test_one_participant_alone_may_measure_what_joining_is_worth(tmp_path: Path) -> None:
    config = personal_common(tmp_path, method="mh-pfedhn", measure_alone=False)
    nodes = simulated_nodes(6)
    run_tiny(config, node_configs=[*nodes[:5], {**nodes[5], "measure-alone": True}])
    assert [row["client_id"] for row in client_rows(config) if row["gain"]] == ["5"]
    assert summary(config)["num_measured"] == 1


def test_the_common_model_learns_and_so_does_the_predictor(tmp_path: Path) -> None:
    config = personal_common(tmp_path, rounds=12)
    run_tiny(config)
    last = rows(config)[-1]
    assert last["accuracy_common"] > 0.8
    assert last["accuracy_micro"] > 0.8


@pytest.mark.parametrize("sharing", ["chunks", "own"])
def test_all_common_models_share_one_head_group_with_nobody_else(
    tmp_path: Path, sharing: str
) -> None:
    config = personal_common(tmp_path, rounds=1, head_sharing=sharing)
    run_tiny(config)
    facts = read_json(checkpoints(config)[-1] / "meta.json")["learned"]["hypernet"]["groups"]
    common = {key for name, key in facts.items() if name.startswith("__global__/")}
    assert len([name for name in facts if name.startswith("__global__/")]) == 6
    assert len(common) == 1
    assert not common & {key for name, key in facts.items() if not name.startswith("__global__/")}


def test_the_common_model_teaches_by_its_lead_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str, most: float) -> list[float]:
        config = personal_common(tmp_path / name, rounds=4, distill_alpha=most)
        run_tiny(config)
        return [row["train_loss"] for row in rows(config)]

    taught, untaught = losses("taught", 0.9), losses("untaught", 0.0)
    assert taught != untaught
    monkeypatch.setattr("client_app.predictor.PER_POINT", 0.0)  # nobody leads
    assert losses("nobody leads", 0.9) == untaught


@pytest.mark.parametrize("method", ["mh-pfedhn-pg", "mh-pfedhn", "local-ensemble"])
def test_the_personal_model_says_what_joining_was_worth(tmp_path: Path, method: str) -> None:
    config = personal_common(tmp_path, method=method)
    run_tiny(config)
    for row in client_rows(config):
        folder = Path(config.run.output_dir) / "personal-models" / row["client_id"]
        described = read_json(folder / "personal_model.json")
        assert described["test_accuracy"] == float(row["accuracy"])
        for name in {name for name in row if name.startswith("accuracy_")} | {"gain"}:
            assert described[name] == float(row[name])


@pytest.mark.parametrize("method", ["mh-pfedhn-pg", "mh-pfedhn-gd", "mh-pfedhn", "fedavg"])
def test_the_model_trained_alone_is_that_of_local(tmp_path: Path, method: str) -> None:
    beside = personal_common(tmp_path / "beside", rounds=3, method=method)
    local = personal_common(tmp_path / "local", rounds=3, method="local")
    kept = []
    for config, name in ((beside, "alone"), (local, "own_model")):
        state = str(tmp_path / name)
        run_tiny(config, node_configs=[{**n, "state-dir": state} for n in simulated_nodes(6)])
        kept.append(load_file(tmp_path / name / f"5/{name}@00000003.safetensors"))
    assert_all_equal(*kept)  # weights and statistics; the model of client 5 has dropout
    for row, alone in zip(rows(beside), rows(local), strict=True):
        assert row["accuracy_alone"] == alone["accuracy_micro"]
        assert "accuracy_alone" not in alone


def test_the_predictor_is_owned_at_the_end(tmp_path: Path) -> None:
    """The program alone gives the accuracy that the description says; so do both models, mixed."""
    state = tmp_path / "state"
    own = {"state-dir": str(state), **trusting(tmp_path)}
    nodes = [{"client-id": f"c{i}", "partition-id": i, **own} for i in range(6)]
    config = personal_common(tmp_path, rounds=3)
    run_tiny(config, node_configs=nodes)
    folder = state / "c5"  # its own model is of another architecture than the common one
    facts = json.loads((folder / "personal_model.json").read_text())
    images, labels = patterns()
    rows_tested = np.load(folder / "test_rows.npy")
    x, y = torch.from_numpy(images[rows_tested])[:, None], torch.from_numpy(labels[rows_tested])
    said = torch.export.load(folder / "personal_model.pt2").module()(x)
    assert float((said.argmax(1) == y).float().mean()) == pytest.approx(facts["test_accuracy"])
    mean, std = (torch.tensor(facts[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    weight, both = facts["weight_of_own_model"], []
    for name in ("own", "common"):
        scope: dict[str, Any] = {}
        line = facts[f"load_{name}"].replace("load_file('", f"load_file('{folder}/")
        exec(line, scope)
        logits = scope["model"]((x / 255 - mean) / std)
        hits = float((logits.argmax(1) == y).float().mean())
        assert hits == pytest.approx(facts[f"accuracy_{name}"])
        both.append(logits.softmax(1))
    assert 0 <= facts["accuracy_alone"] <= 1
    mixed = weight * both[0] + (1 - weight) * both[1]
    torch.testing.assert_close(said.exp(), mixed, rtol=1e-4, atol=1e-5)
    run_tiny(personal_common(tmp_path / "next", method="mh-pfedhn"), node_configs=nodes)
    assert not [*folder.glob("own_model.*"), *folder.glob("common_model.*")]
