"""The log, as in the integration tests, and a SuperLink without processes, with two nodes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import logged
from tests.support.link import Link, guarded_link

__all__ = ["logged"]


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    with guarded_link(tmp_path) as opened:
        yield opened
