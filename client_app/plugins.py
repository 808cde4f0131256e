"""A participant's own code, named in a config as `module:attribute`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from common.errors import MHpFedHNError


def load_callable(
    spec: str, *, key: str, error: type[MHpFedHNError], example: str
) -> Callable[..., Any]:
    """Import `module:attribute` and return the callable it names; raise `error` if that fails.

    The message names the config `key` that holds it and an `example` of a correct value.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute.isidentifier():
        raise error(f"{key} = {spec!r} must be 'module:attribute', for instance {example!r}.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as cause:
        raise error(
            f"{key} = {spec!r}: cannot import {module_name!r} ({cause}). Install the package, or "
            "put the folder that holds it on PYTHONPATH of the process that runs the client."
        ) from cause
    found = getattr(module, attribute, None)
    if not callable(found):
        state = "nothing" if found is None else f"a {type(found).__name__}, not a callable,"
        raise error(f"{key} = {spec!r}: {module.__file__} has {state} under {attribute!r}.")
    return found  # type: ignore[no-any-return]
