"""Which clients share heads, and which get their parameters generated together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from common.config import HypernetSection

BLOCK_CLIENTS = 64
BLOCK_BYTES = 256 * 2**20
LEAST_CLIENTS = 8
"""A block never has fewer for its size alone: reading the heads of 11 M parameters costs more."""


def num_chunks(num_parameters: int, chunk_size: int) -> int:
    """Return tau_i = ceil(K_i / S), the chunks that hold `num_parameters` scalars."""
    return -(-num_parameters // chunk_size)


def head_group(
    section: HypernetSection, client_id: str, chunks: int, tag: str = ""
) -> tuple[str, int]:
    """Return the key of a client's head group and the number of heads of that group.

    `head-sharing` decides, and nothing but counts and a declared tag is known of a client:

    - "chunks": equally many chunks, as published (docs/method.md, "Hypernetwork"); key "79".
    - "tolerance": size classes, fixed in advance so that nothing depends on who comes first; the
      largest has at most `sharing-tolerance` more chunks than the smallest; key "92".
    - "tag": equally many chunks and an equal tag; key "79-1f0c...".
    - "own": nobody shares; key "79-<client_id>".

    Differs from paper: all but "chunks" (its appendix C.5 compares separate heads).

    >>> head_group(HypernetSection(head_sharing="tolerance"), "site-a", 79)
    ('92', 92)
    """
    heads, suffix = chunks, ""
    match section.head_sharing:
        case "tolerance":  # classes 1, 2, 3, ...: each starts one above the largest of the last
            heads = 1
            while heads < chunks:
                heads = max(heads + 1, int((heads + 1) * (1 + section.sharing_tolerance)))
        case "tag":
            suffix = f"-{tag}"
        case "own":
            suffix = f"-{client_id}"
    return f"{heads}{suffix}", heads


def group_order(key: str) -> tuple[int, str]:
    """Sort key of head groups: by size, then by name."""
    count, _, rest = key.partition("-")
    return int(count), rest


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


def blocks(client_ids: Sequence[str], size_of: Callable[[str], int]) -> Iterator[Sequence[str]]:
    """Cut clients into runs that are generated together: float32 within `BLOCK_BYTES`.

    Only the list and the sizes decide, so that two runs make the same products. The runs are of
    nearly equal length: a product of one or two rows takes another path through the BLAS.
    """
    if not client_ids:
        return
    largest = 4 * max(map(size_of, client_ids))
    most = min(BLOCK_CLIENTS, max(LEAST_CLIENTS, BLOCK_BYTES // largest))
    count = -(-len(client_ids) // most)
    edges = [len(client_ids) * i // count for i in range(count + 1)]
    for first, stop in pairwise(edges):
        yield client_ids[first:stop]
