"""What baselines send: vectors by name, and class means of which only what is there travels."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from common import parcels
from common.class_means import ClassMeans, pool
from common.config import TrainingSection
from common.errors import WireError
from common.parcels import Parcel, Work
from common.records import payload_bytes
from common.wire import Evaluation, Header

SOURCE = "train.personal reply of client 3 in round 7"


def parcel(**arrays: object) -> Parcel:
    return Parcel(ArrayRecord({k: Array(np.asarray(x)) for k, x in arrays.items()}), SOURCE)


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
    got = ClassMeans.read(parcel(**sent), 10, 3)
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
        ({"counts": np.ones(3, np.float32)}, "counts has shape (3,); expected (4,), one entry"),
        (
            {"counts": np.float32([1, 0, -1, 0])},
            "counts must be whole numbers from 0 to 16,777,216",
        ),
        ({"counts": np.float32([1, 0.5, 0, 0])}, "counts must be whole numbers"),
        ({"counts": np.zeros(4, np.float32)}, "not all 0; got 0 to 0"),
        ({"counts": np.float32([1, np.nan, 0, 0])}, "counts has 1 of 4 entries that are NaN"),
        (
            {"counts": np.float32([1, 0, 9, 0]), "means": np.ones(3, np.float32)},
            "means has shape (3,); expected (4,), 2 entries for each class with a count above 0.",
        ),
        (
            {"counts": np.float32([1, 0, 0, 0]), "means": np.ones(2, np.float64)},
            "means has dtype float64; expected float32",
        ),
    ],
)
def test_bad_class_means_are_refused(arrays: dict, message: str) -> None:
    with pytest.raises(WireError) as caught:
        ClassMeans.read(parcel(**arrays), 4, 2)
    assert str(caught.value).startswith(SOURCE)
    assert message in str(caught.value)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_counts_are_exact_whatever_the_precision(precision: str) -> None:
    means = ClassMeans(np.array([1001, 0, 4097]), np.float32([[1, 2], [0, 0], [3, 4]]))
    content = parcels.encode_order(Header("f", 1, precision), means.arrays())
    order = parcels.decode_order(content, SOURCE)
    assert ClassMeans.read(order.parcel, 3, 2).counts.tolist() == [1001, 0, 4097]


def test_order_and_work_survive_the_wire() -> None:
    header, theta = Header("f", 4), np.float32([1, 2, 3])
    content = parcels.encode_order(
        header, {"theta": theta}, training=TrainingSection(batch_size=9), evaluate=True
    )
    order = parcels.decode_order(content, SOURCE, trains=True)
    assert (order.header, order.evaluate) == (header, True)
    assert order.training == TrainingSection(batch_size=9)
    assert order.parcel.vector("theta", 3).tolist() == [1, 2, 3]
    tested = Evaluation(10, 7, 0.5, 0.1, {"head": 3})
    sent = parcels.encode_work(Work(5, 0.25, 1.0, tested), {}, "float32")
    work, empty = parcels.decode_work(sent, SOURCE, ["head"])
    assert work == Work(5, 0.25, 1.0, tested)
    assert "theta" not in empty
    assert payload_bytes(sent) == 0


def test_a_forged_count_of_another_predictor_is_refused() -> None:
    sent = parcels.encode_work(
        Work(5, 0.1, 1.0, Evaluation(10, 7, 0.5, 0.1, {"head": 11})), {}, "float32"
    )
    with pytest.raises(WireError, match="num-correct-head 11 is more than num-test 10"):
        parcels.decode_work(sent, SOURCE, ["head"])
