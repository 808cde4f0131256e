"""The suite on two cores: which tests share a worker, and how many threads each worker takes.

``TEST_ROUNDING=by-shape`` makes products round as on another processor: `tests.support.rounding`.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Some hundred processes are started: without kept bytecode each would compile what it imports.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
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


@pytest.fixture(scope="session", autouse=True)
def what_takes_longer_than_the_rounds() -> Iterator[None]:
    """Draw a run's pictures only for who asks (`draws`), and do not wait for the disk.

    No machine is switched off here: what a killed process wrote is there for the next.
    """
    from server_app.output.run_folder import RunFolder

    draw = RunFolder._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "_draw", lambda self: draw(self) if _draws else None)
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


_draws = False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note whether a test looks at pictures."""
    global _draws
    _draws = item.get_closest_marker("draws") is not None


if os.environ.get("TEST_ROUNDING") == "by-shape":
    from tests.support.rounding import RoundingByShape

    RoundingByShape().__enter__()
