"""What an error of a deployed participant may say to the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, MHpFedHNError, WireError

HIDDEN = "<path>"
SPOKEN = (ConfigError, WireError)
"""Errors about what both sides know. Those of data, models and code may name files and layers."""

_PATH = re.compile(r"(?<![\w:/.<>])(?:~?/|[A-Za-z]:\\)[^\s'\":;,()]+|<path>[/\\][^\s'\":;,()]*")


def outgoing_error(error: Exception, node_config: Mapping[str, Any]) -> MHpFedHNError:
    """Return the error that leaves a participant: no paths, no layer names, no traceback.

    The whole error belongs in the participant's own log.
    """
    if isinstance(error, SPOKEN):
        return type(error)(without_paths(str(error), node_config))
    kind = type(error).__name__
    return MHpFedHNError(
        f"{kind} on the participant's side. Its own log says why; ask whoever runs it."
    )


def without_paths(text: str, node_config: Mapping[str, Any]) -> str:
    """Replace absolute paths, the declared ones (which may hold blanks) first."""
    declared = [str(v) for k, v in node_config.items() if k.endswith("-dir") and v]
    for path in sorted({*declared, str(Path.cwd()), str(Path.home())}, key=len, reverse=True):
        text = text.replace(path, HIDDEN) if len(path) > 1 else text
    return _PATH.sub(HIDDEN, text)
