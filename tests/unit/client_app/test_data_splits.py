"""Who owns which examples: the published splits and the library's partitioners."""

from __future__ import annotations

import numpy as np
import pytest

from client_app.data.partitions import LIBRARY, split_by_library
from client_app.data.splits import (
    Indices,
    split_dirichlet,
    split_pathological,
    split_train_test,
    thin_out,
)
from common.errors import ConfigError, DataError

BALANCED = np.repeat(np.arange(10), 100)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _disjoint(parts: list[Indices]) -> bool:
    rows = np.concatenate(parts)
    return len(np.unique(rows)) == len(rows)


def _pathological(seed: int = 0, clients: int = 12, classes: int = 2) -> list[Indices]:
    return split_pathological(
        BALANCED, num_clients=clients, classes_per_client=classes, rng=_rng(seed)
    )


@pytest.mark.parametrize("seed", range(10))
def test_pathological_gives_every_client_its_classes_and_no_stray(seed: int) -> None:
    parts = _pathological(seed, classes=5)
    assert [len(np.unique(BALANCED[part])) for part in parts] == [5] * 12
    assert _disjoint(parts)
    assert all((np.diff(part) > 0).all() for part in parts)


def test_pathological_divides_a_drawn_class_completely_and_nearly_evenly() -> None:
    parts = _pathological()
    held = {label: [p for p in parts if label in BALANCED[p]] for label in range(10)}
    assert max(len(owners) for owners in held.values()) > 1
    for label, owners in held.items():
        sizes = [int((BALANCED[part] == label).sum()) for part in owners]
        assert sum(sizes) == (100 if owners else 0)
        # weights are from U(0.4, 0.6): no share is more than 1.5 times another (plus rounding)
        assert not sizes or max(sizes) <= 1.5 * min(sizes) + 2


def test_splits_are_deterministic_and_depend_on_the_seed() -> None:
    first, again, other = _pathological(1), _pathological(1), _pathological(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_dirichlet_uses_every_example_and_respects_the_minimum() -> None:
    parts = split_dirichlet(BALANCED, num_clients=8, alpha=0.5, min_examples=30, rng=_rng())
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert min(len(part) for part in parts) > 30


def test_dirichlet_with_a_small_alpha_concentrates_classes() -> None:
    labels = np.repeat(np.arange(100), 50)
    parts = split_dirichlet(labels, num_clients=20, alpha=0.01, min_examples=30, rng=_rng())
    largest = [np.bincount(labels[part], minlength=100).max() / 50 for part in parts]
    assert np.mean(largest) > 0.95


# a cap on a client's examples


@pytest.mark.parametrize(
    ("counts", "most", "kept"),
    [
        ((60, 30, 10), 10, (6, 3, 1)),
        ((60, 30, 10), 99, (59, 30, 10)),  # shares 59.4, 29.7, 9.9: the largest remainders
        ((50, 50, 50), 4, (2, 1, 1)),
        ((97, 2, 1), 10, (10, 0, 0)),
    ],
)
def test_thinned_out_classes_keep_their_proportions(
    counts: tuple[int, ...], most: int, kept: tuple[int, ...]
) -> None:
    labels = _rng(5).permutation(np.repeat([3, 7, 8], counts))
    rows = thin_out(labels, most=most, rng=_rng())
    assert tuple((labels[rows] == label).sum() for label in (3, 7, 8)) == kept
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, thin_out(labels, most=most, rng=_rng()))
    assert most > 90 or not np.array_equal(rows, thin_out(labels, most=most, rng=_rng(1)))


# train and test


@pytest.mark.parametrize(("count", "num_test"), [(2, 1), (3, 1), (4, 1), (100, 25), (1001, 250)])
def test_train_test_sizes(count: int, num_test: int) -> None:
    labels = np.zeros(count, dtype=np.int64)
    train, test = split_train_test(labels, test_fraction=0.25, rng=_rng())
    assert (len(train), len(test)) == (count - num_test, num_test)
    assert sorted([*train, *test]) == list(range(count))


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_both_sides_keep_an_example(fraction: float) -> None:
    train, test = split_train_test(np.arange(5), test_fraction=fraction, rng=_rng())
    assert len(train) >= 1
    assert len(test) >= 1


@pytest.mark.parametrize("seed", range(10))
def test_a_rare_class_is_tested_when_it_has_one_to_spare(seed: int) -> None:
    labels = np.array([0] * 50 + [1] * 2 + [2])
    train, test = split_train_test(labels, test_fraction=0.25, rng=_rng(seed))
    assert len(test) == 13
    assert sorted([*train, *test]) == list(range(53))
    assert 1 in labels[test]


# partitioners of flwr-datasets: importing that library takes seconds

LIBRARY_CASES: dict[str, tuple[int, dict[str, object]]] = {
    "iid": (7, {}),
    "linear": (7, {}),
    "square": (4, {}),
    "exponential": (4, {}),
    "size": (3, {"partition_sizes": [100, 200, 300]}),
    "shard": (10, {"num_shards_per_partition": 2}),
    "inner-dirichlet": (2, {"partition_sizes": [400, 400], "alpha": 1.0}),
    "library-dirichlet": (5, {"alpha": 1.0}),
    "library-pathological": (10, {"num_classes_per_partition": 3}),
}


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.filterwarnings("ignore")
def test_library_partitions_by_name(name: str) -> None:
    clients, options = LIBRARY_CASES[name]
    first, again = (
        split_by_library(name, BALANCED, num_clients=clients, seed=3, options=options)
        for _ in range(2)
    )
    assert len(first) == clients
    assert _disjoint(first)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    if name == "size":
        assert [len(part) for part in first] == [100, 200, 300]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("iid", {"alpha": 1}, ConfigError, "partition 'iid'.*unexpected keyword argument 'alpha'"),
        ("library-dirichlet", {}, ConfigError, "missing a required argument: 'alpha'. Options: al"),
        ("iid", {"num_partitions": 4}, DataError, "makes 4 clients, num-partitions is 3"),
        ("size", {"partition_sizes": [900, 900, 1]}, DataError, "cannot divide 1000 examples"),
    ],
)
def test_library_partition_that_cannot_be_drawn(
    name: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        split_by_library(name, BALANCED, num_clients=3, seed=3, options=options)
