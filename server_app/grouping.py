"""Which clients share heads.

A criterion maps a client's size to the key of its head group. The published one groups clients by
their number of chunks (method.md, "Hypernetwork"); the key is the number of heads of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Criterion = Callable[[int, int], int]
"""(num_parameters, chunk_size) -> key of the head group."""


def num_chunks(num_parameters: int, chunk_size: int) -> int:
    """Return tau_i = ceil(K_i / S), the chunks that hold `num_parameters` scalars."""
    return -(-num_parameters // chunk_size)


def by_num_chunks(num_parameters: int, chunk_size: int) -> int:
    """Let clients with equally many chunks share heads (the paper's criterion)."""
    return num_chunks(num_parameters, chunk_size)


def members_by_group(
    client_ids: Iterable[str], key_of: Callable[[str], int]
) -> dict[int, Sequence[int]]:
    """Return the positions of the clients of each head group.

    Groups come in ascending order of their key, positions in the order given, so that nothing
    depends on the order in which sizes were first seen.

    >>> members_by_group(["b", "a", "c"], {"a": 2, "b": 9, "c": 2}.__getitem__)
    {2: [1, 2], 9: [0]}
    """
    positions: dict[int, list[int]] = {}
    for position, client_id in enumerate(client_ids):
        positions.setdefault(key_of(client_id), []).append(position)
    return {key: positions[key] for key in sorted(positions)}
