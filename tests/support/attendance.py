"""An in-process grid whose nodes come and go, and have keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.proto.node_pb2 import NodeInfo

from experiments.run.engines.inprocess import InProcessGrid

FIRST_NODE = 2


def attended_by(
    plan: Callable[[int], Iterable[int]],
    keys: Mapping[int, bytes] | None = None,
    names: Mapping[int, str] | None = None,
) -> type[InProcessGrid]:
    """Make a grid class for one run.

    `plan` says for each round which node configs are online; the server looks once a round. A node
    with a public key in `keys` is registered by name, that of `names` where it is there.
    """

    class Grid(InProcessGrid):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            Grid.looks += 1
            return [FIRST_NODE + index for index in plan(Grid.looks)]

        def get_nodes(self) -> Iterable[NodeInfo]:
            return [self._info(node_id) for node_id in self.get_node_ids()]

        def _info(self, node_id: int) -> NodeInfo:
            key = (keys or {}).get(node_id - FIRST_NODE)
            name = (names or {}).get(node_id - FIRST_NODE, f"node {node_id}") if key else None
            return NodeInfo(node_id=node_id, public_key=key or b"", name=name)

    return Grid
