"""`mh-pfedhn bench --quick` measures everything once and writes the keys that tools rely on."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import HypernetSection, RunConfig, ScheduleSection, UpdateSection
from common.errors import ConfigError, RunError
from experiments.bench import add_bench_parser
from experiments.benchmarks.batched import batched_training
from experiments.benchmarks.child import measure_in_child
from experiments.benchmarks.machine import Machine
from experiments.benchmarks.rounds import SCHEDULES, Workload, attempt, batched
from experiments.benchmarks.server import least_bytes
from experiments.benchmarks.suite import clear_runs, earlier, failures, overhead, server
from experiments.run.presets import Preset

SERVER_KEYS = ScheduleSection.key_names() | HypernetSection.key_names() | UpdateSection.key_names()


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_bench_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments])
    code: int = args.command(args)
    return code


@pytest.mark.slow
def test_quick_bench_writes_the_promised_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = "server,client,batched,wire,round,runtime,memory"
    arguments = ["--quick", "--repeats", "1", "--parts", parts, "--output-dir", str(tmp_path)]
    assert bench(*arguments) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {"sequential_seconds", "parallel_seconds", "ratio"} <= found["server"].keys()
    assert found["server"]["sizes"][0]["least_squares"]["parallel_seconds"] > 0
    assert found["server"]["ratio"] == found["server"]["sizes"][0]["in_turns"]["ratio"]
    assert {"reference_seconds", "ray_seconds", "inprocess_seconds"} <= found["round"].keys()
    assert found["round"]["reference_seconds"] > 0
    assert found["round"]["inprocess_seconds"] > 0
    assert found["runtime"]["overhead_fraction"] > 0
    assert {"step_seconds", "dataloader_step_seconds"} <= found["client"].keys()
    assert found["batched"]["cnn/cpu"]["ratio"] > 0
    for name in ("float32", "float16", "bfloat16"):
        assert {"bytes", "encode_seconds", "decode_seconds"} <= found["wire"][name].keys()
    assert found["wire"]["bfloat16"]["bytes"] < 0.55 * found["wire"]["float32"]["bytes"]
    assert found["memory"]["num_accepted"] == 4
    assert 1e8 < found["memory"]["peak_bytes"] < found["memory"]["limit_bytes"] == 4e9
    printed = capsys.readouterr().out
    assert found["machine"]["cpu"] in printed
    assert "GFLOP/s" in printed


def test_batched_clients_are_timed_on_equal_results() -> None:
    sizes = {"num_clients": 3, "steps": 1}
    found = batched_training("cnn", 1, **sizes, device=torch.device("cpu"))
    assert found["ratio"] == found["one_by_one_seconds"] / found["batched_seconds"]
    assert 0 < found["difference"] < 1e-3


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"part 'servr'.*server"):
        bench("--parts", "servr", "--output-dir", str(tmp_path))


def test_a_bound_is_the_time_of_the_scarcer_resource() -> None:
    machine = Machine("x", 2, 1, 1, 0.0, "none", "none", "2", flops=100.0, bandwidth=10.0)
    bound = machine.bound(4.0, flops=100.0, traffic=10.0)
    assert bound["bound_seconds"] == 2.0
    assert bound["distance"] == 2.0
    assert machine.bound(1.0, flops=1.0, traffic=100.0)["bounded_by"] == "memory traffic"


def test_memory_is_estimated_before_a_size_is_tried() -> None:
    assert least_bytes(1000, 11_000_000) > 60e9
    assert least_bytes(1000, 239_856) < 2e9
    assert least_bytes(10, 11_000_000, "least-squares") < 7e9 < 20e9 < least_bytes(10, 11_000_000)


def test_the_target_row_comes_first_and_overhead_is_a_share() -> None:
    rows = [
        {"num_clients": 10, "num_parameters": 239_856, "ratio": 1.0},
        {"num_clients": 50, "num_parameters": 239_856, "ratio": 2.0, "at_rest": {"ratio": 3.0}},
    ]
    assert (server(rows)["ratio"], server(rows)["adam_ratio"]) == (3.0, 2.0)
    idle = {"engines": {"inprocess": {"idle_seconds": 1.0}}}
    assert overhead(idle, {"inprocess_seconds": 10.0})["overhead_fraction"] == 0.1
    assert overhead({"engines": {}}, {}) == {}


def test_earlier_parts_of_the_same_machine_are_kept(tmp_path: Path) -> None:
    machine = Machine("x", 2, 1, 1, 0.0, "none", "none", "2", flops=100.0, bandwidth=10.0)
    path = tmp_path / "bench.json"
    assert earlier(path, machine, quick=False) == {}
    path.write_text(json.dumps({"machine": machine.facts(), "quick": False, "wire": {"a": 1}}))
    assert earlier(path, machine, quick=False)["wire"] == {"a": 1}
    assert earlier(path, machine, quick=True) == {}
    assert earlier(path, replace(machine, gpu="H100"), quick=False) == {}
    path.write_text("{")
    assert earlier(path, machine, quick=False) == {}


def test_what_failed_is_found_and_too_little_memory_is_no_failure(tmp_path: Path) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("CUDA out of memory")

    row = attempt(broken)
    assert failures({"sizes": [{"skipped": "needs 60 GB"}, {"cuda": row}]}) == [
        "RuntimeError: CUDA out of memory"
    ]
    assert "in broken" in row["traceback"]
    assert failures({"sizes": [{"skipped": "needs 60 GB"}]}) == []


def test_earlier_runs_are_cleared_and_decoded_data_stay(tmp_path: Path) -> None:
    for name in ("cache", "inprocess-parallel"):
        (tmp_path / name).mkdir()
    clear_runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_clients_that_were_not_batched_give_no_batched_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.run.engines.together.can_train_together", lambda _: False)
    work = Workload(2, "", tmp_path, quick=True)
    with pytest.raises(RunError, match="0 of 6 trainings were batched"):
        batched(work, work.config("batched"))


def test_the_parallel_round_has_the_settings_of_its_preset() -> None:
    flat = Preset.load("cifar100-parallel").config.flat()
    measured = {key.replace("_", "-"): value for key, value in SCHEDULES["parallel"].items()}
    assert measured.items() <= flat.items()
    own = {key for key, value in flat.items() if value != RunConfig().flat()[key]}
    # what moves no second: the length of a run and the size of its steps
    assert own & SERVER_KEYS - {"lr-decay", "lr-decay-from"} <= measured.keys()


def test_a_child_that_fails_says_its_last_words() -> None:
    row = measure_in_child(
        "experiments.benchmarks.server", ["1", "100", "1", "1", "no-such-rule", "cpu"]
    )
    assert row["failed"]
    assert "no-such-rule" in row["skipped"]
    small = measure_in_child(
        "experiments.benchmarks.server", ["2", "3000", "1", "1", "at-rest", "cpu"]
    )
    assert small["parallel_seconds"] > 0
