"""The form of every part of the configuration."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

HeadSharing = Literal["chunks", "tolerance", "tag", "own"]
"""Which clients share heads: `server_app.hypernet.groups`."""

Scalar = bool | int | float | str


def kebab(name: str) -> str:
    """Return a field name as a key.

    >>> kebab("server_lr")
    'server-lr'
    """
    return name.replace("_", "-")


class Section(BaseModel):
    """A frozen part of the configuration; keys are the kebab-case field names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=kebab, populate_by_name=True
    )

    @classmethod
    @cache
    def key_names(cls) -> frozenset[str]:
        """Return the kebab-case keys of this section."""
        return frozenset(kebab(name) for name in cls.model_fields)

    def flat(self) -> dict[str, Scalar]:
        """Return the section as flat kebab-case keys and scalar values."""
        return self.model_dump(by_alias=True)
