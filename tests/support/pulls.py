"""A gradient of the hypernetwork from plain deltas."""

from collections.abc import Sequence

from torch import Tensor

from server_app.aggregation.adam import Gradient, backward
from server_app.hypernet.base import by_group
from server_app.hypernet.network import Hypernetwork


def pull(hypernet: Hypernetwork, *pulls: tuple[str, Tensor, float]) -> Gradient:
    """Pull (client_id, delta, share of the step) back; all heads and the trunk learn."""
    columns: Sequence[Sequence] = [*zip(*pulls, strict=True)]
    return backward(hypernet, by_group(hypernet, *columns), heads=hypernet.groups)
