"""A delta of which only some entries travel: their places, and their values in the wire precision.

Places go up in the smaller of two forms, told apart by dtype: a bitmap (uint8, a bit an entry, the
highest first), or gaps (uint16 or uint32): the first place plus one, then the distance from each
place to the next. Gaps of at least 1 are sorted and unique by construction.

Shapes: P entries of the dense vector, k of them sent.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from common.compression import Float32, Precision
from common.errors import WireError
from common.records import decode_vector, encode_vector, read_array

Places = NDArray[np.int64]
Raw = np.ndarray[Any, Any]

PLACES = "-places"


def num_kept(length: int, top_k: float) -> int:
    """Return how many of `length` entries a fraction stands for, at least one.

    >>> num_kept(1001, 0.1), num_kept(5, 0.001)
    (101, 1)
    """
    return max(1, math.ceil(top_k * length))


def places_of_largest(x: Float32, count: int) -> Places:
    """Return the places (k,), ascending, of the `count` entries of x (P,) largest in magnitude.

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


def encode_delta(name: str, x: Float32, precision: Precision, *, top_k: float) -> dict[str, Array]:
    """Encode x (P,) whole when `top_k` is 1, else its entries that are not 0."""
    if top_k == 1:
        return encode_vector(name, x, precision)
    places = np.flatnonzero(x)
    if not places.size:
        places = np.zeros(1, dtype=np.int64)  # a vector of zeros is sent as one of them
    packed = Array(_packed(places, x.size))
    return encode_vector(name, x[places], precision) | {name + PLACES: packed}


def decode_delta(
    arrays: ArrayRecord, name: str, *, length: int, top_k: float, source: str
) -> Float32:
    """Decode what `encode_delta` made of a vector (P,) and check it; what was not sent is 0.

    Raises
    ------
    WireError
        An array is missing or cannot be read; the places are not of this vector, not sorted and
        unique, or more than `top_k` allows; or the values are not as many or not finite.
    """
    if top_k == 1:
        return decode_vector(arrays, name, length=length, source=source)
    raw = read_array(arrays, name + PLACES, source)
    places = _unpacked(raw, length, f"{source}: {name}{PLACES}")
    most = num_kept(length, top_k)
    if not 0 < places.size <= most:
        raise WireError(
            f"{source}: {name}{PLACES} names {places.size} entries; 1 to {most} are accepted, "
            f"uplink-top-k = {top_k:g} of the {length} entries of the client's model. Client and "
            "server must have the same uplink-top-k."
        )
    values = decode_vector(
        arrays,
        name,
        length=places.size,
        source=source,
        meaning=f"one value for each place of {name}{PLACES}.",
    )
    dense = np.zeros(length, dtype=np.float32)
    dense[places] = values
    return dense


def _packed(places: Places, length: int) -> Raw:
    """Return the smaller form of ascending places (k,) in a vector of `length` entries."""
    gaps = np.diff(places, prepend=-1)
    small = gaps.astype(np.uint16 if gaps.max() < 2**16 else np.uint32)
    if small.nbytes <= -(-length // 8):
        return small
    chosen = np.zeros(length, dtype=bool)
    chosen[places] = True
    return np.packbits(chosen)


def _unpacked(raw: Raw, length: int, what: str) -> Places:
    """Return the places (k,), ascending, below `length`; `what` starts the error message."""
    if raw.ndim != 1 or str(raw.dtype) not in ("uint8", "uint16", "uint32"):
        raise WireError(
            f"{what} is {raw.dtype} {raw.shape}; expected a bitmap, uint8 ({-(-length // 8)},), or "
            "gaps between places, uint16 or uint32 (k,)."
        )
    if raw.dtype == np.uint8:
        return _from_bitmap(raw, length, what)
    if raw.size > length:
        raise WireError(f"{what} names {raw.size} places; the vector has {length} entries.")
    if raw.size and raw.min() == 0:
        raise WireError(
            f"{what} has a gap of 0: an entry twice. Gaps between places are at least 1, the first "
            "one counted from -1."
        )
    places = np.cumsum(raw, dtype=np.int64) - 1
    if places.size and places[-1] >= length:
        raise WireError(f"{what} reaches entry {places[-1]}; the last entry is {length - 1}.")
    return places


def _from_bitmap(bits: Raw, length: int, what: str) -> Places:
    if bits.size != -(-length // 8):
        raise WireError(
            f"{what} is a bitmap of {bits.size} bytes; a vector of {length} entries has "
            f"{-(-length // 8)}."
        )
    chosen = np.unpackbits(bits)
    if chosen[length:].any():
        raise WireError(f"{what} has bits behind the last entry, {length - 1}.")
    return np.flatnonzero(chosen)
