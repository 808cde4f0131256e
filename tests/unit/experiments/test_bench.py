"""`mh-pfedhn bench --quick` measures everything once and writes the keys that tools rely on."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from common.errors import ConfigError, RunError
from experiments.bench import add_bench_parser
from experiments.benchmarks.measuring import Machine, in_own_process
from experiments.benchmarks.rounds import Workload, batched
from experiments.benchmarks.server import measure
from experiments.benchmarks.suite import earlier

MACHINE = Machine("x", 2, 1, 1, 0.0, "none", "none", "2", flops=100.0, bandwidth=10.0)


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
    parts = "server,client,batched,wire,round,runtime,memory,registered"
    arguments = ["--quick", "--repeats", "1", "--parts", parts, "--output-dir", str(tmp_path)]
    assert bench(*arguments) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {"sequential_seconds", "parallel_seconds", "ratio"} <= found["server"].keys()
    assert found["server"]["rows"]["4 x 6,000 kernel cpu"]["ratio"] > 0
    assert found["server"]["rows"]["4 x 6,000 adam cpu"]["reference_cpu_seconds"] > 0
    assert {"reference_seconds", "ray_seconds", "inprocess_seconds"} <= found["round"].keys()
    assert found["round"]["reference_seconds"] > 0
    assert found["round"]["inprocess_seconds"] > 0
    assert found["runtime"]["overhead_fraction"] > 0
    assert {"step_seconds", "dataloader_step_seconds"} <= found["client"].keys()
    assert found["batched"]["rows"]["cnn/cpu"]["ratio"] > 0
    for name in ("float32", "float16", "bfloat16"):
        assert {"bytes", "encode_seconds", "decode_seconds"} <= found["wire"]["rows"][name].keys()
    sizes = {name: row["bytes"] for name, row in found["wire"]["rows"].items()}
    assert sizes["bfloat16"] < 0.55 * sizes["float32"]
    assert found["memory"]["num_accepted"] == 4
    assert 1e8 < found["memory"]["peak_bytes"] < found["memory"]["limit_bytes"] == 4e9
    assert found["registered"]["rows"]["3 registered"]["typical_seconds"] > 0
    printed = capsys.readouterr().out
    assert found["machine"]["cpu"] in printed
    assert "GFLOP/s" in printed


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"part 'servr'.*server"):
        bench("--parts", "servr", "--output-dir", str(tmp_path))


def test_earlier_parts_of_the_same_machine_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert earlier(path, MACHINE, quick=False) == {}
    path.write_text(json.dumps({"machine": asdict(MACHINE), "quick": False, "wire": {"rows": {}}}))
    assert earlier(path, MACHINE, quick=False) == {"wire": {"rows": {}}}
    assert earlier(path, MACHINE, quick=True) == {}
    assert earlier(path, replace(MACHINE, gpu="H100"), quick=False) == {}
    path.write_text("{")
    assert earlier(path, MACHINE, quick=False) == {}


def test_a_part_that_fails_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict[str, float]:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("experiments.benchmarks.suite.quiet", lambda: None)  # of this process
    monkeypatch.setattr("experiments.benchmarks.suite.wire_part", broken)
    assert bench("--quick", "--repeats", "1", "--parts", "wire", "--output-dir", str(tmp_path)) == 1
    row = json.loads((tmp_path / "bench.json").read_text())["wire"]["rows"]["wire"]
    assert row["skipped"] == "RuntimeError: CUDA out of memory"
    assert "in broken" in row["traceback"]


def test_clients_that_were_not_batched_give_no_batched_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.run.engines.together.can_train_together", lambda _: False)
    work = Workload(2, "", tmp_path, quick=True)
    with pytest.raises(RunError, match="0 of 6 trainings were batched"):
        batched(work, work.config("batched"))


def test_a_measurement_that_fails_in_its_own_process_says_why() -> None:
    row = in_own_process(measure, 2, 3000, 1, "adam", "no-such-device", 2)
    assert row["failed"]
    assert "no-such-device" in row["skipped"]
    for cohort in (1, 2):
        row = in_own_process(measure, 2, 3000, 1, "kernel", "cpu", cohort)
        assert row["parallel_seconds"] > 0
        assert row["cohort"] == cohort
