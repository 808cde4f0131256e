"""What this process and this machine do: memory that training frees, arithmetic in bfloat16."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

from common.log import logger

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20
"""Bytes; the largest threshold that glibc takes on 64-bit machines."""
MOST_KEPT = 512 * 2**20
"""Bytes at the top of the heap that may stay free without going back to the system."""


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep what it is given back, for the process's life; returns whether it does.

    By default it may return a freed activation to the system at once and ask for it again in the
    next batch; the system clears every page of it anew. For the CNN that was up to a third of a
    step, depending on where blocks happen to lie (docs/performance.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = [mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT), mallopt(M_TRIM_THRESHOLD, MOST_KEPT)]
    return all(kept)


@cache  # once in a process
def warn_of_slow_bfloat16(device_type: str) -> None:
    """Say so where bfloat16 costs time instead of saving it: a CPU without instructions for it.

    There every number is converted back and forth; with AVX2 alone five architectures took more
    than five times as long as in float32.
    """
    if device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "training-precision bfloat16 is several times slower than float32 on this processor: "
            "it has no instructions for it (AVX512-BF16 or AMX). Set training-precision to float32."
        )
