"""Another processor's rounding: products that round by their shape and by the place in them.

A BLAS chooses its kernel, and with it the order of its sums, by the shapes and by the processor.
Where one processor gives equal bits for two batch sizes, the next one does not. With
``TEST_ROUNDING=by-shape`` in the environment products differ like that on any processor: a test
that compares bits across shapes fails, and one that repeats the same shapes passes. It holds in the
main thread: tests with threads of their own have no use for it.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {
    "aten::addbmm",
    "aten::addmm",
    "aten::addmv",
    "aten::baddbmm",
    "aten::bmm",
    "aten::convolution",
    "aten::convolution_backward",
    "aten::dot",
    "aten::linear",
    "aten::mm",
    "aten::mv",
}
MOST_ULPS = 2


class RoundingByShape(TorchDispatchMode):
    """Move every entry of a product by up to two units in the last place.

    Whole numbers stay: sums of whole numbers are exact in any order.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removesuffix("_")  # type: ignore[attr-defined]
        if name in PRODUCTS:
            shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
            seed = zlib.crc32(repr((name, shapes)).encode())
            for out in result if isinstance(result, tuple | list) else (result,):
                if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float64):
                    _round_otherwise(out, seed)
        return result


def _round_otherwise(out: Tensor, seed: int) -> None:
    """Move the entries in place, by a pattern that `seed` starts."""
    steps = (torch.arange(out.numel()).view(out.shape) + seed) % (2 * MOST_ULPS + 1) - MOST_ULPS
    moved = out * (1 + steps * torch.finfo(out.dtype).eps)
    out.copy_(torch.where(out == out.round(), out, moved))
