"""The form of every part of the configuration: typed fields that are kebab-case keys."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ConfigError, unknown_name

Scalar = bool | int | float | str


def kebab(name: str) -> str:
    """Return a field name as a key.

    >>> kebab("server_lr")
    'server-lr'
    """
    return name.replace("_", "-")


def key(default: Any, meaning: str, *, unit: str = "", where: str = "", **bounds: Any) -> Any:
    """Declare a key: its default, its meaning, its unit, where it matters, and pydantic's bounds.

    `where` names the methods, rules or engines that look at it; empty: every run does.
    """
    return Field(
        default, description=meaning, json_schema_extra={"unit": unit, "where": where}, **bounds
    )


class Section(BaseModel):
    """A frozen part of the configuration; keys are the kebab-case field names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    @classmethod
    @cache
    def key_names(cls) -> frozenset[str]:
        """Return the kebab-case keys of this section."""
        return frozenset(kebab(name) for name in cls.model_fields)

    @classmethod
    def pick(cls, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of some flat keys that are this section's."""
        return {name: value for name, value in flat.items() if name in cls.key_names()}

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build the section; raise ConfigError that names `where`, the key and what is wrong."""
        require_known(values, cls.key_names(), where)
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            name = kebab(str(first["loc"][0])) if first["loc"] else "value"
            raise ConfigError(
                f"{where}: {name} = {first.get('input')!r} cannot be used: {first['msg']}."
            ) from error

    def flat(self) -> dict[str, Scalar]:
        """Return the section as flat kebab-case keys and scalar values."""
        return self.model_dump(by_alias=True)


def require_known(flat: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Raise ConfigError, naming the nearest key, where a key is none of those known."""
    for name in flat:
        if name not in known:
            raise ConfigError(f"{where}: {unknown_name('key', name, known)}")
