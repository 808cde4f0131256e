from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.report.runs import Run
from experiments.report.track import TRACKERS, tag, tracked
from tests.unit.experiments.run_folders import metric_row, write_seed

ACCURACY = "accuracy/accuracy_micro"
Points = list[tuple[int, float, float]]
"""Round, accuracy, seconds since 1970."""


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def read_tensorboard(folder: Path) -> tuple[Points, dict[str, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    points = [(e.step, round(e.value, 6), e.wall_time) for e in events.Scalars(ACCURACY)]
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    config = HParamsPluginData.FromString(start).session_start_info.hparams
    return points, {key: str(value.number_value) for key, value in config.items()}


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a log in blocks of 32 KiB: checksum, length, kind (1: whole, 4: the last part)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def read_wandb(folder: Path) -> tuple[Points, dict[str, str]]:
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    points: Points = []
    config: dict[str, str] = {}
    for record in wandb_records(file):
        config |= {item.key: item.value_json for item in record.run.config.update}
        if record.HasField("history"):
            item = {"/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            points.append((item["_step"], item[ACCURACY], item["_timestamp"]))
    return points, config


def read_mlflow(folder: Path) -> tuple[Points, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mh-pfedhn").experiment_id])
    assert run.info.run_name == folder.parent.name
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, ACCURACY)
    return [(m.step, m.value, m.timestamp / 1000) for m in history], run.data.params


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


def test_every_tracker_can_be_read_back() -> None:
    assert READERS.keys() == TRACKERS.keys()


@pytest.mark.parametrize("name", TRACKERS)
def test_rounds_are_written_while_the_run_runs_and_again_afterwards(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a"
    run.mkdir()
    with tracked(name, Run(run, {"batch-size": 64})) as lines:
        write_seed(run, accuracies=(0.1, 0.4), row={"grad_norm": float("nan")})
    assert [str(run / name) in line for line in lines] == [True]
    points, config = READERS[name](run / name)
    assert [point[:2] for point in points] == [(1, 0.1), (2, 0.4)]
    assert float(config["batch-size"]) == 64

    assert main(["track", str(run), "--to", name]) == 0
    assert lines[0] in capsys.readouterr().out
    points, config = READERS[name](run / name)
    ended = (run / "summary.json").stat().st_mtime
    assert [point[:2] for point in points] == [(1, 0.1), (2, 0.4)]
    assert [point[2] for point in points] == pytest.approx([ended - 10, ended], abs=1)
    assert float(config["chunk-size"]) == 3072


def test_a_tracker_that_breaks_stops_tracking_and_not_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with tracked("tensorboard", Run(folder)) as lines:
        rows = [
            metric_row(1, 0.5),
            {"accuracy_micro": 0.5},
            metric_row(3, 0.5),
        ]  # one without round
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "KeyError" in lines[0]
    assert f"mh-pfedhn track {folder} --to tensorboard" in lines[1]


def test_a_store_that_refuses_is_said_before_the_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at.all")
    words = ["run", "quickstart", "--track", "mlflow", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "mlflow cannot begin a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRACKERS)
def test_without_its_package_the_error_says_what_to_install(
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    folder = tmp_path / "out"
    assert main(["track", str(write_seed(tmp_path / "a")), "--to", name]) == 2
    assert f"pip install {TRACKERS[name].package}`" in capsys.readouterr().err
    assert main(["run", "quickstart", "--track", name, "--output-dir", str(folder)]) == 2
    assert not folder.exists()


def test_names_are_grouped() -> None:
    assert tag("test_loss") == "loss/test_loss"
    assert tag("coherence") == "server/coherence"
