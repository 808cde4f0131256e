"""Errors that teach: what was expected, what came, from whom, and what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MHpFedHNError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(MHpFedHNError):
    """A run config or node config holds a key or value that cannot be used."""


class DataError(MHpFedHNError):
    """A data set or partition cannot be loaded, drawn or read."""


class ModelError(MHpFedHNError):
    """A model cannot be built, or does not fit the method (size, parameters, names)."""


class WireError(MHpFedHNError):
    """A message does not hold what the protocol says."""


class RegistrationError(MHpFedHNError):
    """A client cannot be admitted to the federation."""


class CheckpointError(MHpFedHNError):
    """A checkpoint cannot be written, or read back whole."""


class RunError(MHpFedHNError):
    """A run cannot go on (too few good replies, no clients, a broken runtime)."""


LONGEST = 500
"""Characters of one name in an error message: others may have made it up."""


def listing(items: Iterable[object], limit: int = 10) -> str:
    """Join items for an error message, naming at most `limit` of them.

    >>> listing(["a", "b"])
    'a, b'
    """
    names = [" ".join(str(item)[:LONGEST].split()) for item in items]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" (+{rest} more)" if rest > 0 else "")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is not a known `kind`, name the nearest one and list the others."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {listing(choices, 40)}."
