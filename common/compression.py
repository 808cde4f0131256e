"""A flat vector as it travels: in which precision, and which of its entries.

A vector is one array of float32 values, of bfloat16 bits (uint16), or of float16 values with one
scale per block in a second array, `<name>-scales`. Of a sparse vector only some entries travel,
their positions in `<name>-indices`, in the smaller of two forms that the dtype tells apart: a
bitmap (uint8, a bit an entry, the highest first), or gaps (uint16 or uint32): the first position
plus one, then the distance from each position to the next. Gaps of at least 1 are sorted and unique
by construction.

numpy only: a process that merely forwards a message need not import torch.

Shapes: P entries of the dense vector, k of them sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import WireError, listing

Precision = Literal["float32", "float16", "bfloat16"]
Float32 = NDArray[np.float32]
Indices = NDArray[np.int64]
Raw = np.ndarray[Any, Any]

SCALES, INDICES = "-scales", "-indices"

SCALE_BLOCK = 1024
"""Entries that share one float32 scale under float16: 0.4 % more bytes, no subnormals lost."""

WIRE_DTYPES = ("float32", "float16", "uint16")

MODEL_ENTRIES = (
    "one entry for each trainable parameter of the client's model. Did the model change after "
    "registration?"
)


def pack(name: str, x: Float32, precision: Precision, *, top_k: float = 1.0) -> dict[str, Raw]:
    """Return the arrays that stand for x (P,): all of it when `top_k` is 1, else what is not 0."""
    if top_k == 1:
        return _pack_dense(name, x, precision)
    indices = np.flatnonzero(x)
    if not indices.size:
        indices = np.zeros(1, dtype=np.int64)  # a vector of zeros is sent as one of them
    return _pack_dense(name, x[indices], precision) | {name + INDICES: _packed(indices, x.size)}


def unpack(
    name: str,
    read: Callable[[str], Raw],
    *,
    length: int,
    top_k: float = 1.0,
    meaning: str = MODEL_ENTRIES,
) -> Float32:
    """Return the vector (length,) that `pack` was given; what was not sent is 0.

    `read` returns an array by name. Raises WireError where an array is missing or has a wrong dtype
    or shape (`meaning` then says what the entries stand for), the indices are not of this vector or
    more than `top_k` allows, or an entry is not finite.
    """
    if top_k == 1:
        return _unpack_dense(name, read, length, meaning)
    indices = _unpacked(read(name + INDICES), length, name + INDICES)
    most = num_kept(length, top_k)
    if not 0 < indices.size <= most:
        raise WireError(
            f"{name}{INDICES} names {indices.size} entries; 1 to {most} are accepted, uplink-top-k "
            f"= {top_k:g} of the {length} entries of the client's model. Client and server must "
            "have the same uplink-top-k."
        )
    dense = np.zeros(length, dtype=np.float32)
    meaning = f"one value for each position of {name}{INDICES}."
    dense[indices] = _unpack_dense(name, read, indices.size, meaning)
    return dense


def num_kept(length: int, top_k: float) -> int:
    """Return how many of `length` entries a fraction stands for, at least one.

    >>> num_kept(1001, 0.1), num_kept(5, 0.001)
    (101, 1)
    """
    return max(1, math.ceil(top_k * length))


def indices_of_largest(x: Float32, count: int) -> Indices:
    """Return the positions (k,), ascending, of the `count` entries of x (P,) largest in magnitude.

    Of equal ones the first are taken, so that the choice does not depend on the machine.
    """
    if count >= x.size:
        return np.arange(x.size)
    size = np.abs(x)
    bound = np.partition(size, x.size - count)[x.size - count]
    chosen = size > bound
    equal = np.flatnonzero(size == bound)
    chosen[equal[: count - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen)


def rounded(x: Float32, precision: Precision) -> Float32:
    """Return x (P,) as the receiver will have it."""
    if precision == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    if precision == "float16":
        return from_scaled_float16(*to_scaled_float16(x))
    return x


def to_bfloat16(x: Float32) -> NDArray[np.uint16]:
    """Round x (P,) to the nearest bfloat16, ties to even; returns the raw bits (P,) uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Float32:
    """Return the float32 values (P,) of bfloat16 bits (P,)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_scaled_float16(x: Float32) -> tuple[NDArray[np.float16], Float32]:
    """Scale blocks of `SCALE_BLOCK` entries to a largest magnitude of 1 and round to float16.

    Returns values (P,) and scales (ceil(P / SCALE_BLOCK),) float32, with x = values * scale.
    """
    blocks = np.zeros((num_blocks(x.size), SCALE_BLOCK), dtype=np.float32)
    blocks.reshape(-1)[: x.size] = x
    scales = np.abs(blocks).max(axis=1)
    scales[scales == 0] = 1.0
    values = (blocks / scales[:, None]).astype(np.float16)
    return values.reshape(-1)[: x.size].copy(), scales


def from_scaled_float16(values: NDArray[np.float16], scales: Float32) -> Float32:
    """Return the float32 values (P,) of scaled float16 values (P,)."""
    scale_of_entry = np.repeat(scales, SCALE_BLOCK)[: values.size]
    return (values.astype(np.float32) * scale_of_entry).astype(np.float32)


def num_blocks(size: int) -> int:
    """Count the scale blocks of a vector of `size` entries."""
    return -(-size // SCALE_BLOCK)


def _pack_dense(name: str, x: Float32, precision: Precision) -> dict[str, Raw]:
    if precision == "bfloat16":
        return {name: to_bfloat16(x)}
    if precision == "float16":
        values, scales = to_scaled_float16(x)
        return {name: values, name + SCALES: scales}
    return {name: np.ascontiguousarray(x, dtype=np.float32)}


def _unpack_dense(name: str, read: Callable[[str], Raw], length: int, meaning: str) -> Float32:
    raw = read(name)
    if str(raw.dtype) not in WIRE_DTYPES:
        raise WireError(
            f"{name} has dtype {raw.dtype}; expected {listing(WIRE_DTYPES)}. Convert it to float32 "
            "before it is sent."
        )
    if raw.shape != (length,):
        raise WireError(f"{name} has shape {raw.shape}; expected ({length},), {meaning}")
    if raw.dtype == np.uint16:
        x = from_bfloat16(raw)
    elif raw.dtype == np.float16:
        scales, count = read(name + SCALES), num_blocks(length)
        if scales.dtype != np.float32 or scales.shape != (count,):
            raise WireError(
                f"{name}{SCALES} is {scales.dtype} {scales.shape}; expected float32 ({count},)."
            )
        x = from_scaled_float16(raw, scales)
    else:
        x = raw.copy()  # what came is read-only
    bad = int(np.count_nonzero(~np.isfinite(x)))
    if bad:
        raise WireError(
            f"{name} has {bad} of {length} entries that are NaN or infinite. Training diverged "
            "there: lower the learning rate or check that client's data."
        )
    return x


def _packed(indices: Indices, length: int) -> Raw:
    """Return the smaller form of ascending positions (k,) in a vector of `length` entries."""
    gaps = np.diff(indices, prepend=-1)
    small = gaps.astype(np.uint16 if gaps.max() < 2**16 else np.uint32)
    if small.nbytes <= -(-length // 8):
        return small
    chosen = np.zeros(length, dtype=bool)
    chosen[indices] = True
    return np.packbits(chosen)


def _unpacked(raw: Raw, length: int, what: str) -> Indices:
    """Return the positions (k,), ascending, below `length`; `what` starts the error message."""
    num_bytes = -(-length // 8)
    if raw.ndim != 1 or str(raw.dtype) not in ("uint8", "uint16", "uint32"):
        raise WireError(
            f"{what} is {raw.dtype} {raw.shape}; expected a bitmap, uint8 ({num_bytes},), or gaps "
            "between positions, uint16 or uint32 (k,)."
        )
    if raw.dtype == np.uint8:
        if raw.size != num_bytes:
            raise WireError(
                f"{what} is a bitmap of {raw.size} bytes; a vector of {length} entries has "
                f"{num_bytes}."
            )
        chosen = np.unpackbits(raw)
        if chosen[length:].any():
            raise WireError(f"{what} has bits behind the last entry, {length - 1}.")
        return np.flatnonzero(chosen)
    if raw.size > length:
        raise WireError(f"{what} names {raw.size} positions; the vector has {length} entries.")
    if raw.size and raw.min() == 0:
        raise WireError(
            f"{what} has a gap of 0: an entry twice. Gaps between positions are at least 1, the "
            "first one counted from -1."
        )
    indices = np.cumsum(raw, dtype=np.int64) - 1
    if indices.size and indices[-1] >= length:
        raise WireError(f"{what} reaches entry {indices[-1]}; the last entry is {length - 1}.")
    return indices
