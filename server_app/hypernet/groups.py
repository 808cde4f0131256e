"""Which clients share heads.

A criterion (`head-sharing`) gives every client the key of its head group and says how many heads
that group needs. All of them know counts, tags and embeddings, never an architecture.

- "chunks": equally many chunks (method.md, "Hypernetwork"), as published; key "79".
- "tolerance": classes of size, fixed in advance, so that nothing depends on who comes first; within
  a class the largest has at most `sharing-tolerance` more chunks than the smallest; everybody's
  group has the heads of the largest; key "92".
- "tag": equally many chunks and an equal tag, which the clients declare; key "79-1f0c...".
- "own": nobody shares; key "79-<client_id>".

Differs from paper: all but "chunks" (its appendix C.5 compares separate heads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from common.config import HypernetSection

ALL = "all"


def num_chunks(num_parameters: int, chunk_size: int) -> int:
    """Return tau_i = ceil(K_i / S), the chunks that hold `num_parameters` scalars."""
    return -(-num_parameters // chunk_size)


def place(section: HypernetSection, client_id: str, chunks: int, tag: str) -> tuple[str, int]:
    """Return the key of a client's head group, and how many heads the group needs for it."""
    sharing = section.head_sharing
    if sharing == "tolerance":
        heads = size_class(chunks, section.sharing_tolerance)
        return str(heads), heads
    if sharing in ("own", "tag"):
        return f"{chunks}-{client_id if sharing == 'own' else tag}", chunks
    return str(chunks), chunks


def size_class(chunks: int, tolerance: float) -> int:
    """Return the largest number of chunks of the class that `chunks` belongs to.

    The classes cut 1, 2, 3, ... into runs whose last is at most (1 + tolerance) times the first.

    >>> [size_class(chunks, 0.25) for chunks in (1, 3, 4, 5, 6, 79)]
    [1, 3, 5, 5, 7, 92]
    """
    largest = 1
    while largest < chunks:
        first = largest + 1
        largest = max(first, int(first * (1 + tolerance)))
    return largest


def group_order(key: str) -> tuple[int, str]:
    """Sort key of head groups: by size, then by name."""
    count, _, rest = key.partition("-")
    return (int(count), rest) if count.isdecimal() else (0, key)


def members_by_group(
    client_ids: Iterable[str], key_of: Callable[[str], str]
) -> dict[str, Sequence[int]]:
    """Return the positions of the clients of each head group.

    Groups come in the order of `group_order`, positions in the order given, so that nothing
    depends on the order in which sizes were first seen.

    >>> members_by_group(["b", "a", "c"], {"a": "2", "b": "19", "c": "2"}.__getitem__)
    {'2': [1, 2], '19': [0]}
    """
    positions: dict[str, list[int]] = {}
    for position, client_id in enumerate(client_ids):
        positions.setdefault(key_of(client_id), []).append(position)
    return {key: positions[key] for key in sorted(positions, key=group_order)}
