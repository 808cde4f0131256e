"""Flat settings as TOML text, the form in which Flower reads run and node configs."""

from __future__ import annotations

import json
from collections.abc import Mapping

from common.config import Scalar


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Return `key = value` lines; a TOML basic string is a JSON string for all we write."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in flat.items())


def _value(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=True) if isinstance(value, str) else repr(value)
