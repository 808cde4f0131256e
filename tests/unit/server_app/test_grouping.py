"""Which clients share heads."""

import pytest

from server_app.grouping import by_num_chunks, members_by_group, num_chunks


@pytest.mark.parametrize(
    ("size", "chunks"), [(1, 1), (3071, 1), (3072, 1), (3073, 2), (239_856, 79), (11_000_000, 3581)]
)
def test_num_chunks_is_the_ceiling(size: int, chunks: int) -> None:
    assert num_chunks(size, 3072) == chunks
    assert by_num_chunks(size, 3072) == chunks


def test_members_do_not_depend_on_which_size_came_first() -> None:
    keys = {"big": 9, "a": 2, "b": 2}
    assert members_by_group(["big", "b", "a"], keys.__getitem__) == {2: [1, 2], 9: [0]}
    assert list(members_by_group(["big", "a"], keys.__getitem__)) == [2, 9]


def test_a_client_may_appear_twice() -> None:
    assert members_by_group(["a", "a"], {"a": 3}.__getitem__) == {3: [0, 1]}
