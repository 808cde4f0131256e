"""Grouping, means and errors against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.config import HypernetSection
from common.config.section import Method
from common.errors import ConfigError, DataError, RunError
from experiments.report.commands import run_command
from experiments.report.curves import mean_curve
from experiments.report.embeddings import (
    alignment,
    in_order,
    keep_embeddings,
    learned,
    load_embeddings,
    principal_axes,
)
from experiments.report.groups import Stat, Study, group_runs, load_named, load_study
from experiments.report.labels import label_shares, ordering, overlap, rank_correlation
from experiments.report.looks import METHOD_LOOKS, looks_for
from experiments.report.runs import Run
from experiments.report.settings import essential
from experiments.report.svg import log_ticks, nice_ticks, spread
from experiments.report.tables import markdown, number, percent
from server_app.hypernet.network import Hypernetwork
from server_app.output.figures import METHODS
from tests.unit.experiments.run_folders import write_seed


def study_of(root: Path) -> Study:
    return load_study(root)


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
    groups = study_of(tmp_path).groups
    assert [len(group.counted) for group in groups] == [3, 1]
    assert [group.label for group in groups] == [
        "MH-pFedHN, server-lr 0.0002", "MH-pFedHN, server-lr 0.5",
    ]  # fmt: skip
    stat = groups[0].stat(lambda member: member.last("accuracy_micro"))
    # mean 0.6; deviations -.2, -.1, .3: variance .14 / 2 = .07, error sqrt(.07 / 3)
    assert stat == Stat(pytest.approx(0.6), pytest.approx(math.sqrt(0.07 / 3)), 3)
    assert groups[0].stat(lambda m: m.total("bytes_up")) == Stat(2e6, 0.0, 3)


def test_keys_that_the_code_gained_later_do_not_split_a_group(tmp_path: Path) -> None:
    old = write_seed(tmp_path / "a", seed=1)
    text = (old / "config.json").read_text().replace('"wire-precision": "float32"', '"seed": 1')
    (old / "config.json").write_text(text)
    write_seed(tmp_path / "b", seed=2)
    assert "wire-precision" not in Run.load(old).config
    assert len(study_of(tmp_path).groups) == 1


def test_only_completed_runs_count_and_one_for_each_seed(tmp_path: Path) -> None:
    write_seed(tmp_path / "a", seed=1, accuracies=(0.2, 0.4))
    write_seed(tmp_path / "b", seed=2, accuracies=(0.9,), status="failed", rounds=2)
    write_seed(tmp_path / "c", seed=3, accuracies=(0.9,), status="interrupted", rounds=2)
    again = write_seed(tmp_path / "d", seed=1, accuracies=(0.2, 0.5))
    for name in ("summary.json", "metrics.jsonl"):
        (again / name).touch()
    study = study_of(tmp_path)
    # b and c were asked for two rounds as well, so all four share their settings
    (group,) = study.groups
    assert [m.run.name for m in group.counted] == ["d"]
    reasons = {m.run.name: m.left_out for m in group.left_out}
    assert reasons == {
        "a": "an older run of seed 1",
        "b": "failed after round 1 of 2",
        "c": "interrupted after round 1 of 2",
    }
    table = markdown(study, source="mh-pfedhn report x")
    assert "| MH-pFedHN | 50.0 | 48.0 |" in table
    assert "seed 2: failed after round 1 of 2" in table
    assert "Made by `mh-pfedhn report x`." in table


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_seed(tmp_path / "a")
    broken = write_seed(tmp_path / "b")
    (broken / "summary.json").write_text("{")
    study = study_of(tmp_path)
    assert len(study.members) == 1
    assert str(broken) in study.unreadable[0]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run below"):
        load_study(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        load_study(tmp_path / "nowhere")


def test_compare_takes_runs_and_folders_of_runs(tmp_path: Path) -> None:
    first = write_seed(tmp_path / "x" / "a", seed=1)
    write_seed(tmp_path / "x" / "b", seed=2)
    assert len(load_named([str(tmp_path / "x"), str(first)]).members) == 2


def test_curves_average_rounds_bytes_and_seconds(tmp_path: Path) -> None:
    write_seed(tmp_path / "a", seed=1, accuracies=(0.1, 0.4, 0.6), row={"seconds_round": 2.0})
    write_seed(tmp_path / "b", seed=2, accuracies=(0.3, 0.4, 0.8), row={"seconds_round": 4.0})
    (group,) = study_of(tmp_path).groups
    by_round, by_time = mean_curve(group, "round"), mean_curve(group, "seconds")
    by_bytes, by_bytes_up = mean_curve(group, "bytes"), mean_curve(group, "bytes-up")
    assert by_round and by_time and by_bytes and by_bytes_up  # noqa: PT018
    assert by_round.x == (1, 2, 3)
    assert by_round.y == pytest.approx((0.2, 0.4, 0.7))
    assert by_round.error == pytest.approx((0.1, 0.0, 0.1))  # |a - b| / 2 for two values
    assert by_time.x == (3.0, 6.0, 9.0)
    assert by_bytes.x == (3e6, 6e6, 9e6)
    assert by_bytes_up.x == (1e6, 2e6, 3e6)


def test_a_method_looks_the_same_in_every_study() -> None:
    looks = looks_for([("a", "mh-pfedhn"), ("b", "mh-pfedhn"), ("c", "local"), ("d", "fedavg")])
    assert looks["a"] == METHOD_LOOKS["mh-pfedhn"]
    assert looks["c"] == METHOD_LOOKS["local"]
    assert looks_for([("d", "fedavg")])["d"] == looks["d"]
    assert len(set(looks.values())) == 4
    many = looks_for([(str(i), "mh-pfedhn") for i in range(28)])
    assert len(set(many.values())) == 28


def test_every_method_has_a_look_and_a_name() -> None:
    assert set(METHOD_LOOKS) == set(METHODS) == set(get_args(Method))
    assert len(set(METHOD_LOOKS.values())) == len(METHOD_LOOKS)


def test_labels_are_moved_apart_and_stay_inside() -> None:
    assert spread([10, 11, 50], gap=10, low=0, high=100) == [5.5, 15.5, 50.0]
    assert spread([99, 95, 98], gap=10, low=0, high=100) == [100.0, 80.0, 90.0]
    assert spread([0, 0, 0], gap=10, low=0, high=15) == [0.0, 7.5, 15.0]
    assert spread([], gap=10, low=0, high=15) == []


def test_ticks_are_round_numbers() -> None:
    assert nice_ticks(0, 41) == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert log_ticks(5, 300) == [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]
    assert log_ticks(0.5, 5000) == [1.0, 10.0, 100.0, 1000.0]


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
    folder = write_seed(
        tmp_path / "a", dataset="tests.support.tiny:patterns", image_size=8, partition="iid",
        cache_dir=str(tmp_path / "cache"), num_partitions=4,
    )  # fmt: skip
    shares = label_shares(Run.load(folder), ["0", "3"])
    assert shares.shape == (2, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    with pytest.raises(DataError, match="brought data of their own"):
        label_shares(Run.load(folder), ["hospital-a"])


def write_checkpoint(folder: Path) -> None:
    path = folder / "checkpoint" / "checkpoint-00000002"
    path.mkdir(parents=True)
    tensors = {f"embeddings.{i}": np.full((i + 1, 2), float(i), np.float32) for i in range(3)}
    save_file({**tensors, "trunk.0.bias": np.zeros(4, np.float32)}, path / "tensors.safetensors")


def test_embeddings_survive_their_checkpoint(tmp_path: Path) -> None:
    assert load_embeddings(tmp_path) == {}
    write_checkpoint(tmp_path)
    before = load_embeddings(tmp_path)
    assert {name: value.shape for name, value in before.items()} == {
        "0": (1, 2), "1": (2, 2), "2": (3, 2),
    }  # fmt: skip
    assert keep_embeddings(tmp_path)
    (tmp_path / "checkpoint" / "checkpoint-00000002" / "tensors.safetensors").unlink()
    after = load_embeddings(tmp_path)
    assert in_order(["10", "b", "2", *after]) == ["0", "1", "2", "2", "10", "b"]
    np.testing.assert_array_equal(after["2"], before["2"])


def test_what_is_learned_starts_from_what_the_server_drew() -> None:
    section = HypernetSection(embed_dim=3, chunk_size=10, hidden_dim=4, embedding_std=0.5)
    hypernet = Hypernetwork(section, seed=7)
    hypernet.add_client("a", 25)
    drawn = {"a": hypernet.embeddings["a"].detach().numpy().astype(np.float64)}
    now = {"a": drawn["a"] + np.eye(3)}
    moved = learned({**now, "__global__": drawn["a"]}, {"seed": 7, "embedding-std": 0.5})
    assert list(moved) == ["a"]
    np.testing.assert_allclose(moved["a"], np.eye(3), atol=1e-7)
    assert learned(drawn, {"seed": 7, "embedding-std": 0.5}) == {}, "there is nothing to draw"


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
    points = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    places, shares = principal_axes(points @ points.T)
    np.testing.assert_allclose(np.abs(places[:, 0]), [5.0, 0.0, 5.0], atol=1e-12)
    np.testing.assert_allclose(places[:, 1], 0.0, atol=1e-6)
    assert shares == (pytest.approx(1.0), pytest.approx(0.0))


def test_the_command_of_a_run_is_the_nearest_preset_and_what_differs(tmp_path: Path) -> None:
    folder = write_seed(tmp_path / "a", seed=3, run_name="quickstart", method="mh-pfedhn-gd")
    command = run_command(Run.load(folder))
    assert command.startswith("mh-pfedhn run quickstart --clients 4 --seed 3 --set ")
    assert "models=cnn,vgg8" in command
    assert "method=" not in command
    assert "output-dir" not in command


def test_what_decides_a_result_leaves_out_places() -> None:
    flat = {"method": "mh-pfedhn", "seed": 5, "output-dir": "/x", "data-dir": "/d", "rounds": 3}
    assert essential(flat) == {"seed": 5, "rounds": 3}
    assert essential({**flat, "dataset": "folder"})["data-dir"] == "/d"


def test_groups_are_named_after_their_variant(tmp_path: Path) -> None:
    for i, alpha in enumerate((0.1, 0.9)):
        folder = write_seed(tmp_path / str(i), method="mh-pfedhn-gd", distill_alpha=alpha)
        (folder / "cell.json").write_text('{"variant": "teacher"}')
    runs = [Run.load(tmp_path / str(i)) for i in range(2)]
    groups = group_runs(runs)
    assert [g.label for g in groups] == ["teacher, distill-alpha 0.1", "teacher, distill-alpha 0.9"]
    assert [g.short for g in groups] == ["0.1", "0.9"]
