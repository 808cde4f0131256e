from collections.abc import Iterator
from logging import Handler, LogRecord

import pytest

from common.log import logger


class Lines(Handler):
    """Collects what the project logs; Flower's logger does not propagate to pytest's."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: LogRecord) -> None:
        self.lines.append(record.getMessage())

    def find(self, start: str) -> list[str]:
        return [line for line in self.lines if line.startswith(start)]


@pytest.fixture
def logged() -> Iterator[Lines]:
    handler = Lines()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
