"""Vectors in half precision, and vectors of which only the largest entries travel."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.compression import (
    from_bfloat16,
    indices_of_largest,
    num_kept,
    pack,
    rounded,
    to_bfloat16,
    unpack,
)
from common.errors import WireError


def sparse(length: int, indices: list[int]) -> np.ndarray:
    x = np.zeros(length, dtype=np.float32)
    x[indices] = np.arange(1, len(indices) + 1) / 3
    return x


def reader(arrays: dict[str, np.ndarray]) -> Callable[[str], np.ndarray]:
    return arrays.__getitem__


def num_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("length", "indices", "form"),
    [
        (1000, [0, 999], "uint16"),
        (1001, list(range(0, 1001, 7)), "uint8"),
        (1_200_000, [3, 200_000, 1_199_999], "uint32"),
        (1, [0], "uint8"),
        (20, [], "uint16"),
    ],
)
def test_vector_survives_the_wire(
    length: int, indices: list[int], form: str, precision: str
) -> None:
    x = sparse(length, indices)
    arrays = pack("delta", x, precision, top_k=0.5)
    assert arrays["delta-indices"].dtype == form
    back = unpack("delta", reader(arrays), length=length, top_k=0.5)
    expected = sparse(length, indices)
    expected[indices] = rounded(x[indices], precision)
    np.testing.assert_array_equal(back, expected)


def test_bytes_follow_the_fraction() -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    dense = num_bytes(pack("delta", x, "float32", top_k=1.0))
    for top_k, most in ((0.3, 0.34), (0.1, 0.133), (0.01, 0.016)):
        kept = np.zeros_like(x)
        indices = indices_of_largest(x, num_kept(x.size, top_k))
        kept[indices] = x[indices]
        sent = pack("delta", kept, "float32", top_k=top_k)
        assert num_bytes(sent) < most * dense


def test_largest_are_chosen_and_of_equal_ones_the_first() -> None:
    x = np.array([1, -5, 2, 2, 0, -2, 7], dtype=np.float32)
    assert indices_of_largest(x, 4).tolist() == [1, 2, 3, 6]
    assert indices_of_largest(np.zeros(5, np.float32), 2).tolist() == [0, 1]
    assert indices_of_largest(x, 9).tolist() == list(range(7))
    assert [num_kept(10, f) for f in (0.01, 0.1, 0.11, 1.0)] == [1, 1, 2, 10]


GAPS = np.array([1, 2, 3], np.uint16)  # entries 0, 2 and 5


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (GAPS.astype(np.int64), r"delta-indices is int64 \(3,\); expected a bitmap, uint8 \(2,\)"),
        (GAPS[None], r"delta-indices is uint16 \(1, 3\); expected a bitmap"),
        (np.array([1, 0, 3], np.uint16), "delta-indices has a gap of 0: an entry twice"),
        (np.array([0, 1, 3], np.uint16), "delta-indices has a gap of 0: an entry twice"),
        (np.array([1, 2, 8], np.uint32), "delta-indices reaches entry 10; the last entry is 9"),
        (np.full(3, 2**32 - 1, np.uint32), "delta-indices reaches entry 12884901884; the last"),
        (np.ones(11, np.uint16), "delta-indices names 11 positions; the vector has 10 entries"),
        (np.ones(6, np.uint16), "delta-indices names 6 entries; 1 to 5 are accepted, uplink-top-k"),
        (np.zeros(0, np.uint16), "delta-indices names 0 entries; 1 to 5 are accepted"),
        (np.zeros(2, np.uint8), "delta-indices names 0 entries; 1 to 5 are accepted"),
        (
            np.zeros(3, np.uint8),
            "delta-indices is a bitmap of 3 bytes; a vector of 10 entr",
        ),
        (np.array([0, 7], np.uint8), "delta-indices has bits behind the last entry, 9"),
        (
            np.array([192, 0], np.uint8),
            r"delta has shape \(3,\); expected \(2,\), one value for",
        ),
    ],
)
def test_indices_that_cannot_be_are_refused(indices: np.ndarray, message: str) -> None:
    arrays = {"delta": np.ones(3, np.float32), "delta-indices": indices}
    with pytest.raises(WireError, match=f"^{message}"):
        unpack("delta", reader(arrays), length=10, top_k=0.5)


def test_values_are_checked_like_those_of_a_dense_delta() -> None:
    arrays = {"delta": np.array([1, np.nan, 2], np.float32), "delta-indices": GAPS}
    with pytest.raises(WireError, match="delta has 1 of 3 entries that are NaN or infinite"):
        unpack("delta", reader(arrays), length=10, top_k=0.5)


def test_dense_run_refuses_a_sparse_delta() -> None:
    arrays = pack("delta", sparse(10, [1]), "float32", top_k=0.1)
    with pytest.raises(WireError, match=r"delta has shape \(1,\); expected \(10,\)"):
        unpack("delta", reader(arrays), length=10, top_k=1.0)


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    x = np.random.default_rng(1).standard_normal(4096).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(x)), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_zeros_survive(precision: str) -> None:
    arrays = pack("theta", np.zeros(3, np.float32), precision)
    np.testing.assert_array_equal(unpack("theta", reader(arrays), length=3), np.zeros(3))
