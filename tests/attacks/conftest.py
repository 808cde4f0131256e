"""The log, as in the integration tests."""

from tests.integration.conftest import logged

__all__ = ["logged"]
