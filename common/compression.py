"""Vectors as they travel: float32, bfloat16 bits, or float16 with one scale per block.

numpy only, so that a process that merely forwards a message need not import torch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float32", "float16", "bfloat16"]
Float32 = NDArray[np.float32]

SCALE_BLOCK = 1024
"""Entries that share one float32 scale under float16: 0.4 % more bytes, no subnormals lost."""

WIRE_DTYPES: dict[str, Precision] = {
    "float32": "float32",
    "float16": "float16",
    "uint16": "bfloat16",
}


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

    Returns
    -------
    values (P,) float16 and scales (ceil(P / SCALE_BLOCK),) float32, with x = values * scale.
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


def rounded(x: Float32, precision: Precision) -> Float32:
    """Return x (P,) as the receiver will have it."""
    if precision == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    if precision == "float16":
        return from_scaled_float16(*to_scaled_float16(x))
    return x


def num_blocks(size: int) -> int:
    """Count the scale blocks of a vector of `size` entries."""
    return -(-size // SCALE_BLOCK)
