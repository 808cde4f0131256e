"""Numbers that are equal in mathematics and were computed in another order."""

from collections.abc import Mapping

import torch
from numpy.typing import ArrayLike
from torch import Tensor

RTOL = 1e-4
ATOL = 1e-5
"""A float32 operation rounds by 1.2e-7. The toy products here add up to some hundreds of numbers of
size 1 and a few follow one another; a wrong formula is off by far more than this."""


def assert_close(got: Tensor | ArrayLike, expected: Tensor | ArrayLike, note: str = "") -> None:
    """Compare what has the same mathematics, but other batch shapes, kernels or order of sums.

    Processors choose the order of sums by the shape, so the bits of such numbers are not compared.
    ``torch.equal`` is for repeats with equal shapes on one processor, and for plain copies.
    """
    torch.testing.assert_close(
        torch.as_tensor(got),
        torch.as_tensor(expected),
        rtol=RTOL,
        atol=ATOL,
        check_dtype=False,
        msg=lambda found: f"{note} {found}",
    )


def assert_all_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare the bits of named tensors that were computed in the same shapes, or copied."""
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name
