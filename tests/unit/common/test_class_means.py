"""Means by class, of which only what is there travels."""

import numpy as np
import pytest

from common.class_means import ClassMeans, pool
from common.errors import WireError
from common.records import Content, Header, Received, encode


def received(**arrays: object) -> Received:
    vectors = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    return Received(encode(Header("fed", "fedproto", 1, "n"), Content(arrays=vectors)))


def slow_means(vectors: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    rows = []
    for c in range(num_classes):
        mine = [
            v.astype(np.float64) for v, label in zip(vectors, labels, strict=True) if label == c
        ]
        rows.append(sum(mine) / len(mine) if mine else np.zeros(vectors.shape[1]))
    return np.array(rows)


def test_class_means_are_the_means_of_each_class() -> None:
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(50, 6)).astype(np.float32), rng.integers(0, 4, 50)
    labels[labels == 2] = 3  # nobody has class 2
    found = ClassMeans.of(vectors, labels, 5)
    np.testing.assert_allclose(found.means, slow_means(vectors, labels, 5), atol=1e-6)
    assert found.counts.tolist() == [(labels == c).sum() for c in range(5)]


def test_only_the_classes_that_are_there_travel() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    sent = ClassMeans.of(vectors, np.array([7, 2, 2, 7]), 10).arrays()
    assert {name: x.size for name, x in sent.items()} == {"counts": 10, "means": 2 * 3}
    got = ClassMeans.read(received(**sent), 10, 3)
    assert got.counts[[2, 7]].tolist() == [2, 2]
    assert got.means[7].tolist() == [4.5, 5.5, 6.5]


def test_pooled_means_are_those_of_all_examples_together() -> None:
    rng = np.random.default_rng(1)
    parts = [(rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 4, n)) for n in (5, 9, 2)]
    pooled = pool([ClassMeans.of(v, y, 6) for v, y in parts])
    vectors, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    np.testing.assert_allclose(pooled.means, slow_means(vectors, labels, 6), atol=1e-6)
    assert pooled.counts.sum() == 16


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "array 'counts' is missing; got none"),
        ({"counts": [1] * 3}, "counts has shape (3,); expected (4,), one entry"),
        ({"counts": [1, 0, -1, 0]}, "counts must be whole numbers from 0 to 16,777,216"),
        ({"counts": [1, 0.5, 0, 0]}, "counts must be whole numbers"),
        ({"counts": [0] * 4}, "counts must be whole numbers from 0 to 16,777,216, not all 0; got"),
        ({"counts": [1, np.nan, 0, 0]}, "counts has 1 of 4 entries that are NaN"),
        ({"counts": [9, 0, 9, 0]}, "counts add up to 18; the client has 10 examples."),
        (
            {"counts": [1, 0, 9, 0], "means": [1] * 3},
            "means has shape (3,); expected (4,), 2 entries for each class with a count above 0.",
        ),
    ],
)
def test_bad_class_means_are_refused(arrays: dict, message: str) -> None:
    with pytest.raises(WireError) as caught:
        ClassMeans.read(received(**arrays), 4, 2, most=10)
    assert str(caught.value).startswith(message)
