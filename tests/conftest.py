"""The suite on two cores: which tests share a worker, and how many threads each worker takes.

``TEST_ROUNDING=by-shape`` makes products round as on another processor: `tests.support.rounding`.
"""

import os
from pathlib import Path

import pytest

# Threads of two workers, or of other programs, wait for one another. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
# Their tests start processes that wait for one another: one after the other, beside the rest.
ONE_AFTER_THE_OTHER = ("deployment", "simulation")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one worker, for its fixtures; those of processes too."""
    for item in items:
        path = item.path.relative_to(TESTS)
        group = "processes" if path.parts[0] in ONE_AFTER_THE_OTHER else str(path)
        item.add_marker(pytest.mark.xdist_group(group))


if os.environ.get("TEST_ROUNDING") == "by-shape":
    from tests.support.rounding import RoundingByShape

    RoundingByShape().__enter__()
