"""Grouping, means and errors against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.config import HypernetSection
from common.errors import ConfigError, DataError, RunError
from common.methods import METHODS
from experiments.report.embeddings import (
    alignment,
    keep_embeddings,
    label_shares,
    learned,
    load_embeddings,
    ordering,
    overlap,
    principal_axes,
    rank_correlation,
)
from experiments.report.groups import Stat, load_study
from experiments.report.lines import Axis, average, points
from experiments.report.looks import Look, looks_for
from experiments.report.runs import Run
from experiments.report.settings import essential, run_command
from experiments.report.tables import markdown, number, percent
from server_app.hypernet.network import Hypernetwork
from tests.unit.experiments.run_folders import DATA, write_seed


def test_mean_and_standard_error() -> None:
    stat = Stat.of([0.5, 0.6, 0.7, None, math.nan])
    assert stat == Stat(pytest.approx(0.6), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert Stat.of([0.4]) == Stat(0.4, None, 1)
    assert Stat.of([None]) is None
    assert percent(stat) == "60.0 ± 5.8"
    assert percent(Stat(0.4, None, 1)) == "40.0"
    assert number(Stat(2.0, 0.0, 3), digits=1) == "2.0"
    assert number(Stat(59.7, 0.01, 3), digits=1) == "59.7 ± 0.0"


def test_runs_that_differ_in_seed_and_place_alone_are_a_group(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.4), (2, 0.5), (3, 0.9)):
        name = f"s{seed}"
        write_seed(tmp_path / name, seed=seed, accuracies=(0.1, accuracy), run_name=name,
                   cache_dir=f"/c{seed}", checkpoint_every=seed)  # fmt: skip
    write_seed(tmp_path / "deep" / "other", server_lr=0.5)
    groups = sorted(load_study([str(tmp_path)]).groups, key=lambda group: group.label)
    assert [len(group.counted) for group in groups] == [3, 1]
    assert groups[1].label == "MH-pFedHN, server-lr 0.5"
    # mean 0.6; deviations -.2, -.1, .3: variance .14 / 2 = .07, error sqrt(.07 / 3)
    expected = Stat(pytest.approx(0.6), pytest.approx(math.sqrt(0.07 / 3)), 3)
    assert groups[0].last("accuracy_micro") == expected
    assert groups[0].stat(lambda run: run.total("bytes_up")) == Stat(2e6, 0.0, 3)


def test_keys_that_the_code_gained_later_do_not_split_a_group(tmp_path: Path) -> None:
    old = write_seed(tmp_path / "a", seed=1)
    text = (old / "config.json").read_text().replace('"wire-precision": "float32"', '"seed": 1')
    (old / "config.json").write_text(text)
    write_seed(tmp_path / "b", seed=2)
    assert "wire-precision" not in Run.load(old).config
    assert len(load_study([str(tmp_path)]).groups) == 1


def test_only_completed_runs_count_and_one_for_each_seed(tmp_path: Path) -> None:
    write_seed(tmp_path / "a", seed=1, accuracies=(0.2, 0.4))
    write_seed(tmp_path / "b", seed=2, accuracies=(0.9,), status="failed", rounds=2)
    write_seed(tmp_path / "c", seed=3, accuracies=(0.9,), status="interrupted", rounds=2)
    again = write_seed(tmp_path / "d", seed=1, accuracies=(0.2, 0.5))
    for name in ("summary.json", "metrics.jsonl"):
        (again / name).touch()
    study = load_study([str(tmp_path)])
    (group,) = study.groups
    assert [run.name for run in group.counted] == ["d"]
    assert {run.name: run.left_out for run in group.left_out} == {
        "a": "an older run of seed 1",
        "b": "failed after round 1 of 2",
        "c": "interrupted after round 1 of 2",
    }
    table = markdown(study, source="mh-pfedhn report x")
    assert "| MH-pFedHN | 50.0 | 48.0 |" in table
    assert "seed 2: failed after round 1 of 2" in table
    assert "Made by `mh-pfedhn report x`." in table


def test_what_cannot_be_read_or_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run below"):
        load_study([str(tmp_path)])
    with pytest.raises(ConfigError, match="run 'nowhere'"):
        load_study(["nowhere"])
    write_seed(tmp_path / "a")
    broken = write_seed(tmp_path / "b")
    (broken / "summary.json").write_text("{")
    study = load_study([str(tmp_path)])
    assert len(study.runs) == 1
    assert str(broken) in study.unreadable[0]


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    first = write_seed(tmp_path / "x" / "a", seed=1)
    write_seed(tmp_path / "x" / "b", seed=2)
    assert len(load_study([str(tmp_path / "x"), str(first)]).runs) == 2


def test_curves_average_rounds_bytes_and_seconds(tmp_path: Path) -> None:
    write_seed(tmp_path / "a", seed=1, accuracies=(0.1, 0.4, 0.6), row={"seconds_round": 2.0})
    write_seed(tmp_path / "b", seed=2, accuracies=(0.3, 0.4, 0.8), row={"seconds_round": 4.0})
    (group,) = load_study([str(tmp_path)]).groups
    expected: dict[Axis, tuple[float, ...]] = {
        "round": (1, 2, 3), "seconds": (3, 6, 9), "bytes": (3e6, 6e6, 9e6),
        "bytes-up": (1e6, 2e6, 3e6),
    }  # fmt: skip
    for axis, x in expected.items():
        curve = average([points(run, axis) for run in group.counted])
        assert curve
        assert curve.x == x
        assert curve.y == pytest.approx((0.2, 0.4, 0.7))
        assert curve.error == pytest.approx((0.1, 0.0, 0.1))  # |a - b| / 2 for two values
    assert average([{}, {1: (1.0, 0.5)}]) is None


def test_a_method_looks_the_same_in_every_study() -> None:
    looks = looks_for([("a", "mh-pfedhn"), ("b", "mh-pfedhn"), ("c", "local"), ("d", "fedavg")])
    assert looks["a"] == Look(*METHODS["mh-pfedhn"].look)
    assert looks["c"] == Look(*METHODS["local"].look)
    assert looks_for([("d", "fedavg")])["d"] == looks["d"]
    assert len(set(looks.values())) == 4
    many = looks_for([(str(i), "mh-pfedhn") for i in range(28)])
    assert len(set(many.values())) == 28
    assert len({info.look for info in METHODS.values()}) == len(METHODS)


def test_overlap_and_order_of_labels() -> None:
    shares = np.array([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    overlaps = overlap(shares)
    np.testing.assert_allclose(overlaps, [[1, 0.75, 0], [0.75, 1, 0.25], [0, 0.25, 1]])
    order = ordering(overlaps)
    assert abs(order[0] - order[1]) < abs(order[1] - order[2])
    assert {order.min(), order.max()} == {0.0, 1.0}
    assert list(ordering(np.ones((3, 3)))) == [0.5, 0.5, 0.5]


def test_rank_correlation_shares_the_rank_of_ties() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation(np.array([1.0, 5.0, 5.0, 9.0]), a) == pytest.approx(math.sqrt(0.9))
    assert rank_correlation(np.ones(4), a) is None


def test_labels_of_a_run_come_from_its_partition(tmp_path: Path) -> None:
    run = Run.load(write_seed(tmp_path / "a", cache_dir=str(tmp_path / "cache"), **DATA))
    shares = label_shares(run, ["0", "3"])
    assert shares.shape == (2, 10)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    with pytest.raises(DataError, match="brought data of their own"):
        label_shares(run, ["hospital-a"])


def write_checkpoint(folder: Path) -> Path:
    path = folder / "checkpoint" / "checkpoint-00000002" / "tensors.safetensors"
    path.parent.mkdir(parents=True)
    tensors = {f"embeddings.{i}": np.full((i + 1, 2), float(i), np.float32) for i in range(3)}
    save_file({**tensors, "trunk.0.bias": np.zeros(4, np.float32)}, path)
    return path


def test_embeddings_survive_their_checkpoint(tmp_path: Path) -> None:
    assert load_embeddings(tmp_path) == {}
    checkpoint = write_checkpoint(tmp_path)
    before = load_embeddings(tmp_path)
    assert {k: v.shape for k, v in before.items()} == {"0": (1, 2), "1": (2, 2), "2": (3, 2)}
    assert keep_embeddings(tmp_path)
    checkpoint.unlink()
    np.testing.assert_array_equal(load_embeddings(tmp_path)["2"], before["2"])


def test_what_is_learned_starts_from_what_the_server_drew() -> None:
    section = HypernetSection(embed_dim=3, chunk_size=10, hidden_dim=4, embedding_std=0.5)
    hypernet = Hypernetwork(section, seed=7)
    hypernet.add_client("a", 25)
    tensors, _ = hypernet.state_dict()
    drawn = {"a": tensors["embeddings.a"].numpy().astype(np.float64)}
    now = {"a": drawn["a"] + np.eye(3)}
    config = {"seed": 7, "embedding-std": 0.5, "server-rule": "adam"}
    moved = learned({**now, "__global__": drawn["a"]}, config)
    assert list(moved) == ["a"]
    np.testing.assert_allclose(moved["a"], np.eye(3), atol=1e-7)
    assert learned(drawn, config) == {}, "there is nothing to draw"
    assert learned(now, config | {"server-rule": "kernel"}) == now


def test_alignment_uses_the_chunks_that_both_clients_have() -> None:
    moved = {
        "a": np.array([[1.0, 0.0]]),
        "b": np.array([[2.0, 2.0], [9.0, 9.0]]),
        "c": np.array([[0.0, 1.0], [0.0, 0.0]]),
    }
    root = math.sqrt(0.5)
    expected = [[1, root, 0], [root, 1, 2 / math.sqrt(170)], [0, 2 / math.sqrt(170), 1]]
    np.testing.assert_allclose(alignment(moved, ["a", "b", "c"]), expected)


def test_principal_axes_of_points_on_a_line() -> None:
    line = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    places, shares = principal_axes(line @ line.T)
    np.testing.assert_allclose(np.abs(places[:, 0]), [5.0, 0.0, 5.0], atol=1e-12)
    np.testing.assert_allclose(places[:, 1], 0.0, atol=1e-6)
    assert shares == (pytest.approx(1.0), pytest.approx(0.0))


def test_the_command_of_a_run_is_the_nearest_preset_and_what_differs(tmp_path: Path) -> None:
    folder = write_seed(tmp_path / "a", seed=3, run_name="quickstart", method="mh-pfedhn-pg")
    command = run_command(Run.load(folder))
    assert command.startswith("mh-pfedhn run quickstart --clients 4 --seed 3 --set ")
    assert "models=cnn,vgg8" in command
    assert "method=" not in command
    assert "output-dir" not in command


def test_what_decides_a_result_leaves_out_places() -> None:
    flat = {"method": "x", "seed": 5, "output-dir": "/x", "data-dir": "/d", "rounds": 3}
    assert essential(flat) == {"method": "x", "seed": 5, "rounds": 3}
    assert essential({**flat, "dataset": "folder"})["data-dir"] == "/d"


def test_groups_are_named_after_their_variant(tmp_path: Path) -> None:
    for i, alpha in enumerate((0.1, 0.9)):
        folder = write_seed(tmp_path / str(i), method="mh-pfedhn-gd", distill_alpha=alpha)
        (folder / "cell.json").write_text('{"variant": "teacher"}')
    groups = load_study([str(tmp_path)]).groups
    assert [g.label for g in groups] == ["teacher, distill-alpha 0.1", "teacher, distill-alpha 0.9"]
    assert [g.short for g in groups] == ["0.1", "0.9"]
