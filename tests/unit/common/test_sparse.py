"""Deltas of which only the largest entries travel."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from common.compression import rounded
from common.errors import WireError
from common.sparse import decode_delta, encode_delta, num_kept, places_of_largest

SOURCE = "train.personal reply of client 7 in round 3"


def sparse(length: int, places: list[int]) -> np.ndarray:
    x = np.zeros(length, dtype=np.float32)
    x[places] = np.arange(1, len(places) + 1) / 3
    return x


def num_bytes(arrays: dict[str, Array]) -> int:
    return sum(len(array.data) for array in arrays.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("length", "places", "form"),
    [
        (1000, [0, 999], "uint16"),
        (1001, list(range(0, 1001, 7)), "uint8"),
        (1_200_000, [3, 200_000, 1_199_999], "uint32"),
        (1, [0], "uint8"),
        (20, [], "uint16"),
    ],
)
def test_vector_survives_the_wire(
    length: int, places: list[int], form: str, precision: str
) -> None:
    x = sparse(length, places)
    arrays = encode_delta("delta", x, precision, top_k=0.5)
    assert arrays["delta-places"].dtype == form
    back = decode_delta(ArrayRecord(arrays), "delta", length=length, top_k=0.5, source=SOURCE)
    expected = sparse(length, places)
    expected[places] = rounded(x[places], precision)
    np.testing.assert_array_equal(back, expected)


def test_bytes_follow_the_fraction() -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    dense = num_bytes(encode_delta("delta", x, "float32", top_k=1.0))
    for top_k, most in ((0.3, 0.34), (0.1, 0.133), (0.01, 0.016)):
        kept = np.zeros_like(x)
        places = places_of_largest(x, num_kept(x.size, top_k))
        kept[places] = x[places]
        sent = encode_delta("delta", kept, "float32", top_k=top_k)
        assert num_bytes(sent) < most * dense


def test_largest_are_chosen_and_of_equal_ones_the_first() -> None:
    x = np.array([1, -5, 2, 2, 0, -2, 7], dtype=np.float32)
    assert places_of_largest(x, 4).tolist() == [1, 2, 3, 6]
    assert places_of_largest(np.zeros(5, np.float32), 2).tolist() == [0, 1]
    assert places_of_largest(x, 9).tolist() == list(range(7))
    assert [num_kept(10, f) for f in (0.01, 0.1, 0.11, 1.0)] == [1, 1, 2, 10]


GAPS = np.array([1, 2, 3], np.uint16)  # entries 0, 2 and 5


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, "array 'delta-places' is missing; got delta"),
        (GAPS.astype(np.int64), r"delta-places is int64 \(3,\); expected a bitmap, uint8 \(2,\)"),
        (GAPS[None], r"delta-places is uint16 \(1, 3\); expected a bitmap"),
        (np.array([1, 0, 3], np.uint16), "delta-places has a gap of 0: an entry twice"),
        (np.array([0, 1, 3], np.uint16), "delta-places has a gap of 0: an entry twice"),
        (np.array([1, 2, 8], np.uint32), "delta-places reaches entry 10; the last entry is 9"),
        (np.full(3, 2**32 - 1, np.uint32), "delta-places reaches entry 12884901884; the last"),
        (np.ones(11, np.uint16), "delta-places names 11 places; the vector has 10 entries"),
        (np.ones(6, np.uint16), "delta-places names 6 entries; 1 to 5 are accepted, uplink-top-k"),
        (np.zeros(0, np.uint16), "delta-places names 0 entries; 1 to 5 are accepted"),
        (np.zeros(2, np.uint8), "delta-places names 0 entries; 1 to 5 are accepted"),
        (
            np.zeros(3, np.uint8),
            "delta-places is a bitmap of 3 bytes; a vector of 10 entr",
        ),
        (np.array([0, 7], np.uint8), "delta-places has bits behind the last entry, 9"),
        (
            np.array([192, 0], np.uint8),
            r"delta has shape \(3,\); expected \(2,\), one value for",
        ),
    ],
)
def test_places_that_cannot_be_are_refused(places: np.ndarray | None, message: str) -> None:
    arrays = {"delta": Array(np.ones(3, np.float32))}
    if places is not None:
        arrays["delta-places"] = Array(places)
    with pytest.raises(WireError, match=f"^{SOURCE}: {message}"):
        decode_delta(ArrayRecord(arrays), "delta", length=10, top_k=0.5, source=SOURCE)


def test_values_are_checked_like_those_of_a_dense_delta() -> None:
    arrays = {"delta": Array(np.array([1, np.nan, 2], np.float32)), "delta-places": Array(GAPS)}
    with pytest.raises(WireError, match="delta has 1 of 3 entries that are NaN or infinite"):
        decode_delta(ArrayRecord(arrays), "delta", length=10, top_k=0.5, source=SOURCE)


def test_dense_run_refuses_a_sparse_delta() -> None:
    arrays = encode_delta("delta", sparse(10, [1]), "float32", top_k=0.1)
    with pytest.raises(WireError, match=r"delta has shape \(1,\); expected \(10,\)"):
        decode_delta(ArrayRecord(arrays), "delta", length=10, top_k=1.0, source=SOURCE)
