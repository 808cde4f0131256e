"""Where a participant's own files lie. No torch here: the message's process reads it too."""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import ConfigError

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def safe_name(name: str) -> str:
    """Return the name if it can be a single folder, else raise ConfigError (no path tricks)."""
    if not _SAFE_NAME.fullmatch(name):
        raise ConfigError(
            f"client-id {name!r} cannot name a folder; use up to 100 letters, digits, '.', '_' and "
            "'-', not starting with '.' or '-'."
        )
    return name


def state_folder(state_dir: str, client_id: str) -> Path:
    """Return the folder of one client below `state_dir`."""
    return Path(state_dir).expanduser() / safe_name(client_id)
