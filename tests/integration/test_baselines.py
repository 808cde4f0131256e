"""Every baseline through the real ServerApp and ClientApp, in one process."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file
from torch import nn

from client_app.data.examples import load_client_data
from client_app.models.building import ModelKind, draw_theta
from common.config import RunConfig
from common.seeding import stream_seed, torch_generator
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from tests.integration.conftest import Lines
from tests.support.outputs import assert_same_run, client_rows, rows, summary, tensors
from tests.support.tiny import HERE, MIXED, Handler, Small, Wrapped, run_tiny, tiny_config

SMALL = f"{HERE}:small"  # 172 parameters: features of 8, a head of 36; four classes
ONE_FAMILY = {"lg-fedavg", "fedproto", "fedgh", "fedtgp", "pfedhn"}  # features differ in MIXED


def config_for(folder: Path, method: str, **overrides: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "global_model": SMALL,
        "pfedhn_batches": 4,
    }
    if method in ONE_FAMILY:
        settings["models"] = SMALL
    return tiny_config(folder, method=method, **(settings | overrides))


def recorded(kept: dict[str, list], action: str) -> Wrapped:
    """The real app; notes (client, what came, what went back) of every message of a kind."""

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        came = {k: a.numpy() for k, a in message.content.get("arrays", {}).items()}
        reply = handler(message, context)
        if message.metadata.message_type == action:
            sent = {k: a.numpy() for k, a in reply.content.get("arrays", {}).items()}
            kept["all"].append((context.node_config["partition-id"], came, sent))
        return reply

    return Wrapped(handle)


# --- each one learns, and counts its bytes -------------------------------------------------------

MEANS = [4, 4 * 8]  # counts and means of four classes' features
LOGITS = [4, 4 * 4]
EASY = {"baseline_server_lr": 0.3}


@pytest.mark.parametrize(
    ("method", "up", "down", "first_down"),
    [
        ("local", [], [], []),
        ("local-ensemble", [], [], []),
        ("fedavg", [172], [172], []),
        ("fedavg-ft", [172], [172], []),
        ("fedprox", [172], [172], []),
        ("lg-fedavg", [36], [36], [36]),
        ("fedproto", MEANS, MEANS, []),
        ("fedgh", MEANS, [36], [36]),
        ("fedtgp", MEANS, MEANS, []),
        ("fd", LOGITS, LOGITS, []),
        ("fml", [172], [172], []),
        ("fedkd", [172], [172], []),
        ("pfedhn", [172], [172], [172]),
    ],
)
def test_baseline_learns_and_counts_its_bytes(
    tmp_path: Path, method: str, up: list[int], down: list[int], first_down: list[int]
) -> None:
    config = config_for(tmp_path, method, rounds=5, models=SMALL, **EASY)
    run_tiny(config)
    found = rows(config)
    assert found[-1]["accuracy_micro"] > 0.6, "chance is 0.25"
    assert found[-1]["accuracy_micro"] > found[0]["accuracy_micro"] - 0.1

    def size(vectors: list[int]) -> int:
        return sum(4 * n + 128 for n in vectors)  # 128: the .npy header of each array

    assert [row["bytes_up"] for row in found] == [6 * size(up)] * 5
    expected = [6 * (size(first_down) + size(down))] + [6 * 2 * size(down)] * 4
    assert [row["bytes_down"] for row in found] == expected  # to train, and to evaluate
    found = summary(config)
    assert (found["status"], found["method"]) == ("completed", method)
    assert found["schedule"]["max_in_flight"] == (1 if method == "pfedhn" else 0)


# --- FedAvg, exactly -----------------------------------------------------------------------------


def fedavg_by_hand(config: RunConfig, rounds: int) -> torch.Tensor:
    """Plain torch: every client an SGD of its own, then the mean by examples."""
    section, s, cpu = config.client, config.training, torch.device("cpu")
    theta = draw_theta(ModelKind(SMALL, 1, 4, cpu), stream_seed(config.run.seed, "first-theta"))
    for server_round in range(1, rounds + 1):
        total, weight = torch.zeros_like(theta), 0
        for client in range(6):
            data = load_client_data(section, partition_id=client, seed=config.run.seed, device=cpu)
            model = Small(8, 4)
            nn.utils.vector_to_parameters(theta.clone(), model.parameters())
            optimizer = torch.optim.SGD(
                model.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay
            )
            generator = torch_generator(
                config.run.seed, "shuffle", server_round=server_round, client_id=str(client)
            )
            for images, labels in data.batches(s.batch_size, generator):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                nn.utils.clip_grad_norm_(model.parameters(), s.client_clip_norm)
                optimizer.step()
            trained = nn.utils.parameters_to_vector(model.parameters()).detach()
            total, weight = total + data.num_train * trained, weight + data.num_train
        theta = total / weight
    return theta


def test_fedavg_equals_fedavg_by_hand(tmp_path: Path) -> None:
    config = config_for(tmp_path, "fedavg", rounds=3, models=SMALL, partition="dirichlet",
                        dirichlet_alpha=1.0, min_client_examples=10)  # fmt: skip
    run_tiny(config)
    (model,) = tensors(config).values()
    torch.testing.assert_close(model, fedavg_by_hand(config, 3), atol=1e-6, rtol=0)


def test_fine_tuning_is_measured_and_changes_nothing(tmp_path: Path) -> None:
    plain = config_for(tmp_path / "a", "fedavg", models=f"{HERE}:normed", rounds=3)
    tuned = config_for(tmp_path / "b", "fedavg-ft", models=f"{HERE}:normed", rounds=3)
    for config in (plain, tuned):
        run_tiny(config)
    assert [r["accuracy_micro"] for r in rows(plain)] == [r["accuracy_global"] for r in rows(tuned)]
    assert [r["accuracy_micro"] for r in rows(tuned)] != [r["accuracy_micro"] for r in rows(plain)]


def test_fedprox_stays_closer_to_what_it_received(tmp_path: Path) -> None:
    gaps = {}
    for mu in (0.0, 5.0):
        kept: dict[str, list] = defaultdict(list)
        config = config_for(tmp_path / str(mu), "fedprox", models=SMALL, fedprox_mu=mu, rounds=2)
        run_tiny(config, app=recorded(kept, "train.personal"))
        later = [(came["theta"], sent["theta"]) for _, came, sent in kept["all"] if came]
        gaps[mu] = np.mean([np.linalg.norm(a - b) for a, b in later])
    assert gaps[5.0] < 0.7 * gaps[0.0]


# --- others' particulars -------------------------------------------------------------------------


def test_prototypes_report_the_head_too_and_send_own_classes_alone(tmp_path: Path) -> None:
    kept: dict[str, list] = defaultdict(list)
    config = config_for(
        tmp_path, "fedproto", rounds=2, partition="pathological", classes_per_client=2,
        min_client_examples=5, evaluation="fused",
    )  # fmt: skip
    run_tiny(config, app=recorded(kept, "train.personal"))
    assert {sent["means"].size for _, _, sent in kept["all"]} == {2 * 8}
    assert "accuracy_head" in rows(config)[-1]
    assert "accuracy_head" in client_rows(config)[0]


def test_lg_fedavg_shares_the_head_and_nothing_but_the_head(tmp_path: Path) -> None:
    config = config_for(tmp_path, "lg-fedavg", rounds=2, state_dir=str(tmp_path / "state"))
    run_tiny(config)
    stored = [load_file(tmp_path / "state" / str(i) / "personal_model.safetensors") for i in (0, 5)]
    assert torch.equal(stored[0]["head.weight"], stored[1]["head.weight"])
    assert not torch.equal(stored[0]["hidden.weight"], stored[1]["hidden.weight"])


def test_pfedhn_refuses_a_second_architecture(tmp_path: Path, logged: Lines) -> None:
    nodes = [{"partition-id": i, "num-partitions": 6, "model": SMALL} for i in range(6)]
    nodes[4]["model"] = f"{HERE}:wide"
    config = config_for(tmp_path, "pfedhn", rounds=1)
    run_tiny(config, node_configs=nodes)
    assert "client 4 has another (424 parameters) than client 0" in logged.find("Refused")[0]
    assert rows(config)[0]["num_accepted"] == 5


# --- bad replies ---------------------------------------------------------------------------------


# --- state, order, engines -----------------------------------------------------------------------


# state on the server and on clients in all its kinds; every server's export has a unit test
@pytest.mark.parametrize("method", ["fml", "pfedhn"])
def test_resumed_equals_uninterrupted(tmp_path: Path, method: str) -> None:
    whole, short = (
        config_for(
            tmp_path / name, method, rounds=n, checkpoint_every=1, num_partitions=2,
            state_dir=str(tmp_path / name / "state"),
        )
        for name, n in (("whole", 2), ("short", 1))
    )  # fmt: skip
    run_tiny(whole, num_clients=2)
    run_tiny(short, num_clients=2)
    rest = short.with_overrides({"rounds": 2, "resume-from": short.run.output_dir})
    run_tiny(rest, num_clients=2)
    assert_same_run(rest, whole)


def test_resume_without_state_dir_says_what_is_lost(tmp_path: Path, logged: Lines) -> None:
    config = config_for(tmp_path, "local", rounds=1, num_partitions=2)
    run_tiny(config, num_clients=2)
    rest = config.with_overrides({"rounds": 2, "resume-from": config.run.output_dir})
    run_tiny(rest, num_clients=2)
    assert logged.find("What local keeps on clients (own models, BatchNorm statistics) is lost")


@pytest.mark.parametrize("method", ["fd", "fml"])
def test_architectures_may_differ_and_threads_change_nothing(tmp_path: Path, method: str) -> None:
    first, second = (config_for(tmp_path / x, method, models=MIXED, rounds=2) for x in "ab")
    run_tiny(first)
    run_tiny(second, workers=3)
    assert_same_run(first, second)
    assert rows(first)[-1]["num_evaluated"] == 6


def test_batched_engine_trains_baselines_one_by_one(tmp_path: Path) -> None:
    first, second = (config_for(tmp_path / x, "fedavg", models=SMALL, rounds=1) for x in "ab")
    run_tiny(first)
    run_inprocess(second, simulated_nodes(6), batched_clients=6)
    assert rows(first) == rows(second)


def test_half_the_bytes_with_bfloat16_and_counts_stay_exact(tmp_path: Path) -> None:
    kept: dict[str, list] = defaultdict(list)
    config = config_for(tmp_path, "fedproto", rounds=1, wire_precision="bfloat16")
    run_tiny(config, app=recorded(kept, "train.personal"))
    assert rows(config)[0]["bytes_up"] == 6 * (4 * 4 + 128 + 2 * 32 + 128)
    assert sum(int(sent["counts"].sum()) for _, _, sent in kept["all"]) == 360
