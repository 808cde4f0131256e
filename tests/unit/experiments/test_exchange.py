"""Partitions for PFLlib and HtFLlib, read back as they read them; their results beside ours."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from client_app.data.examples import load_client_data
from experiments.__main__ import main
from experiments.run.presets import Preset
from tests.support.tiny import PRESET
from tests.unit.experiments.run_folders import write_seed

Capture = pytest.CaptureFixture[str]


def as_they_read(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        return dict(np.load(file, allow_pickle=True)["data"].tolist())


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(PRESET.replace("validation-fraction = 0.0", "validation-fraction = 0.1"))
    return file


def test_partitions_are_those_of_the_run(tmp_path: Path, preset: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["export-partitions", str(preset), str(out), "--seed", "7"]) == 0
    config = Preset.load(str(preset)).with_config({"seed": 7}).config
    facts = json.loads((out / "config.json").read_text())
    assert (facts["num_clients"], facts["num_classes"]) == (3, 4)
    for client in range(3):
        data = load_client_data(
            config.client, partition_id=client, seed=7, device=torch.device("cpu")
        )
        for part in ("train", "validation", "test"):
            found = as_they_read(out / part / f"{client}.npz")
            images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
            assert found["x"].dtype == np.float32
            assert np.array_equal(found["y"], labels.numpy())
            assert np.allclose(found["x"], data.normalise(images).numpy())
            assert len(found["x"]) > 5
        counts = dict(map(tuple, facts["Size of samples for labels in clients"][client]))
        assert sum(counts.values()) == data.num_train
    assert "3 participants" in capsys.readouterr().out
    assert main(["export-partitions", str(preset), str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_results_stand_beside_ours(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for seed, last in ((0, 0.5), (1, 0.6)):
        path = tmp_path / f"Cifar10_FedProto_test_{seed}.h5"
        with h5py.File(path, "w") as file:
            file["rs_test_acc"] = [0.1, 0.7, last]
            file["rs_train_loss"] = [2.0, 1.0]
        files.append(str(path))
    runs = tmp_path / "runs"
    words = ["--method", "HtFLlib FedProto", "--eval-gap", "5"]
    assert main(["import-results", *files, str(runs / "theirs"), *words]) == 0
    rows = (runs / "theirs" / "Cifar10_FedProto_test_0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 6, 11]
    for seed in (1, 2):
        write_seed(runs / f"ours-{seed}", seed=seed)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["compare", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "HtFLlib FedProto" in shown
    assert "55.0" in shown, "the mean of their last rounds"
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert main(["import-results", *files, str(runs / "theirs"), *words]) == 2


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_file_without_results_is_said(
    tmp_path: Path, content: bytes | None, capsys: Capture
) -> None:
    path = tmp_path / "x.h5"
    if content is None:
        with h5py.File(path, "w") as file:
            file["other"] = [1.0]
    else:
        path.write_bytes(content)
    assert main(["import-results", str(path), str(tmp_path / "out"), "--method", "A"]) == 2
    assert "x.h5" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()
