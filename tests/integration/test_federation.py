"""The real ServerApp and ClientApp in one process."""

import json
from pathlib import Path

import pytest
from flwr.app import Context, Message
from safetensors.torch import load_file

from tests.support.outputs import assert_same_run, client_rows, rows, summary
from tests.support.tiny import Handler, Wrapped, normed, run_tiny, tiny_config


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd"])
@pytest.mark.parametrize("in_flight", [1, 3, 0])
def test_a_federation_of_three_architectures_learns(
    tmp_path: Path, method: str, in_flight: int
) -> None:
    config = tiny_config(
        tmp_path,
        method=method,
        rounds=16,
        max_in_flight=in_flight,
        buffer_size=in_flight,
        distill_alpha=0.05,
        distill_temperature=4.0,
        server_lr=0.003 if in_flight == 1 else 0.01,
    )
    run_tiny(config)
    found = rows(config)
    assert len(found) == 16
    assert found[0]["accuracy_micro"] < 0.6
    assert found[-1]["accuracy_micro"] > 0.9
    result = summary(config)
    assert result["status"] == "completed"
    assert result["num_clients"] == 6
    assert result["last"]["round"] == 16
    assert result["best"] is None  # there are no validation examples to choose a round by


@pytest.mark.draws
def test_run_folder_holds_what_design_promises(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_tiny(config)
    folder = Path(config.run.output_dir)
    for name in ("config.json", "metrics.jsonl", "clients.csv", "summary.json", "curves.png"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "config.json").read_text()) == config.flat()
    required = {
        *("round", "accuracy_micro", "accuracy_macro", "accuracy_std", "accuracy_worst10"),
        *("test_loss", "train_loss", "bytes_up", "bytes_down"),
        *("seconds_round", "seconds_server", "seconds_clients"),
    }
    for row in rows(config, timed=True):
        assert required <= row.keys()
    required = {"method", "model_families", "num_clients", "rounds", "seed", "schedule", "best"}
    required |= {"last", "bytes_up", "bytes_down", "seconds", "status"}
    assert required <= summary(config).keys()
    table = client_rows(config)
    assert [row["client_id"] for row in table] == [str(i) for i in range(6)]
    correct, total = (sum(int(row[k]) for row in table) for k in ("correct", "num_test"))
    assert correct / total == pytest.approx(rows(config)[-1]["accuracy_micro"])


def test_bytes_count_each_clients_own_parameters(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=1)
    run_tiny(config)
    sizes = {"small": 8 * 17 + 9 * 4, "wide": 20 * 17 + 21 * 4, "normed": 40 + 8 + 68}
    exact = 4 * 2 * sum(sizes.values())
    row = rows(config)[0]
    header = 128 * 6  # the .npy header of each array
    assert row["bytes_up"] == exact + header
    assert row["bytes_down"] == 2 * (exact + header)  # to train and to evaluate


@pytest.mark.parametrize(
    "schedule",
    [
        {"max_in_flight": 1, "buffer_size": 1},
        {"max_in_flight": 4, "buffer_size": 4},
        {"max_in_flight": 0, "buffer_size": 0},
    ],
)
@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd"])
def test_two_runs_are_bitwise_equal(tmp_path: Path, schedule: dict, method: str) -> None:
    first = tiny_config(tmp_path / "a", method=method, **schedule)
    second = tiny_config(tmp_path / "b", method=method, **schedule)
    run_tiny(first)
    run_tiny(second, workers=1 if schedule["max_in_flight"] == 1 else 3)
    assert_same_run(first, second)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    first, second = tiny_config(tmp_path / "a"), tiny_config(tmp_path / "b", seed=43)
    run_tiny(first)
    run_tiny(second)
    assert rows(first)[-1]["train_loss"] != rows(second)[-1]["train_loss"]


def test_fused_gd_learns_in_one_trip_a_round(tmp_path: Path) -> None:
    fused = tiny_config(
        tmp_path / "f", method="mh-pfedhn-gd", gd_mode="fused", evaluation="fused", rounds=16
    )
    seen: list[str] = []

    def count(message: Message, context: Context, handler: Handler) -> Message:
        seen.append(message.metadata.message_type)
        return handler(message, context)

    run_tiny(fused, app=Wrapped(count))
    assert seen.count("train.personal") == 6 * 16
    assert seen.count("evaluate.personal") == 6  # after the last round only
    assert rows(fused)[-1]["accuracy_micro"] > 0.9
    # w_g's own step, of all six clients, beside the six of the personal models
    assert rows(fused)[0]["global_num_updates"] == 6
    assert rows(fused)[0]["global_rms_theta_change"] > 0
    assert rows(fused)[0]["num_server_steps"] == 6


def test_personal_model_is_a_plain_torch_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=4, models="tests.support.tiny:normed")
    run_tiny(config)
    folder = Path(config.run.output_dir) / "personal-models" / "3"
    described = json.loads((folder / "personal_model.json").read_text())
    model = normed(in_channels=1, num_classes=4)
    model.load_state_dict(load_file(folder / "personal_model.safetensors"))
    assert int(model.norm.num_batches_tracked) == 4 * 4  # 60 examples: four batches a round
    row = client_rows(config)[3]
    assert described["test_accuracy"] == pytest.approx(float(row["accuracy"]))
    assert described["model"] == "tests.support.tiny:normed"


@pytest.mark.parametrize("method", ["local", "mh-pfedhn", "mh-pfedhn-pg", "fedproto", "fedavg-ft"])
def test_rounds_are_chosen_on_validation_examples(method: str, tmp_path: Path) -> None:
    """Validation examples as test examples: the same counts under both names."""
    runs = {}
    for examples in ("test", "validation"):
        runs[examples] = tiny_config(
            tmp_path / examples,
            method=method,
            rounds=3,
            tested_on=examples,
            validation_fraction=0.1,
            learning_rate=0.001,
        )
        run_tiny(runs[examples])
    found = rows(runs["test"])
    validated = [row["accuracy_validation"] for row in found]
    assert validated == [row["accuracy_micro"] for row in rows(runs["validation"])]
    assert "fedproto" in method or validated != [row["accuracy_micro"] for row in found]
    assert summary(runs["test"])["best"]["round"] == 1 + validated.index(max(validated))
