"""Which clients share heads."""

import itertools

import pytest

from common.config import HypernetSection
from server_app.hypernet.groups import group_order, members_by_group, num_chunks, place, size_class


@pytest.mark.parametrize(
    ("size", "chunks"), [(1, 1), (3071, 1), (3072, 1), (3073, 2), (239_856, 79), (11_000_000, 3581)]
)
def test_num_chunks_is_the_ceiling(size: int, chunks: int) -> None:
    assert num_chunks(size, 3072) == chunks


@pytest.mark.parametrize(
    ("sharing", "key"),
    [
        ("chunks", ("79", 79)),
        ("tolerance", ("92", 92)),
        ("tag", ("79-0ff1ce", 79)),
        ("own", ("79-site-a", 79)),
    ],
)
def test_criterion_names_the_group_and_its_heads(sharing: str, key: tuple[str, int]) -> None:
    section = HypernetSection(head_sharing=sharing, sharing_tolerance=0.25)
    assert place(section, "site-a", 79, "0ff1ce") == key


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.25, 1.0, 3.0])
def test_size_classes_are_runs_of_at_most_the_tolerance(tolerance: float) -> None:
    largest = [size_class(chunks, tolerance) for chunks in range(1, 2000)]
    for top, run in itertools.groupby(range(1, 2000), key=lambda c: largest[c - 1]):
        smallest = next(run)
        assert smallest <= top <= max(smallest, smallest * (1 + tolerance))
    assert largest == sorted(largest)
    assert size_class(1500, tolerance) == size_class(size_class(1500, tolerance), tolerance)


def test_members_do_not_depend_on_which_size_came_first() -> None:
    keys = {"big": "19", "a": "2", "b": "2"}
    assert members_by_group(["big", "b", "a"], keys.__getitem__) == {"2": [1, 2], "19": [0]}
    assert list(members_by_group(["big", "a"], keys.__getitem__)) == ["2", "19"]


def test_groups_come_by_size_then_name() -> None:
    keys = ["19", "2-b", "all", "2", "19-x-1", "2-a"]
    assert sorted(keys, key=group_order) == ["all", "2", "2-a", "2-b", "19", "19-x-1"]


def test_a_client_may_appear_twice() -> None:
    assert members_by_group(["a", "a"], {"a": "3"}.__getitem__) == {"3": [0, 1]}
