"""What an error of a deployed participant may say to the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, MHpFedHNError, WireError

HIDDEN = "<path>"
KNOWN = ("client-id", "head-tag")
"""What a participant declares and a server is told, or that is nothing but a word."""
SPOKEN = (ConfigError, WireError)
"""Errors about what both sides know. Those of data, models and code may name files and layers."""

TELLING = re.compile(r"[/\\:.\s]")
"""What a declared text has in it that may name a folder, a module or a file."""
_PATH = re.compile(r"(?<![\w:/.<>])(?:~?/|[A-Za-z]:\\)[^\s'\":;,()]+|<path>[/\\][^\s'\":;,()]*")


def outgoing_error(
    error: Exception, node_config: Mapping[str, Any], run_config: Mapping[str, Any]
) -> MHpFedHNError:
    """Return the error that leaves a participant: no paths, no layer names, no traceback.

    The whole error belongs in the participant's own log.
    """
    if isinstance(error, SPOKEN):
        return type(error)(without_paths(without_asked(str(error), run_config), node_config))
    kind = type(error).__name__
    return MHpFedHNError(
        f"{kind} on the participant's side. Its own log says why; ask whoever runs it."
    )


def without_asked(text: str, run_config: Mapping[str, Any]) -> str:
    """Replace what a server's run config says, where it might name something of the participant's.

    What is replaced in it afterwards would tell the server that it has guessed a path here.
    """
    texts = {str(v): f"<the run's {key}>" for key, v in run_config.items()}
    for value in sorted(filter(TELLING.search, texts), key=len, reverse=True):
        text = text.replace(value, texts[value]).replace(repr(value)[1:-1], texts[value])
    return text


def without_paths(text: str, node_config: Mapping[str, Any]) -> str:
    """Replace absolute paths, and first what the participant declared: folders, modules, files.

    Those may be relative, be a share's, or hold blanks. Its name is known to the server.
    """
    texts = {str(v): f"<{key}>" for key, v in node_config.items() if key not in KNOWN}
    hidden = {value: name for value, name in texts.items() if TELLING.search(value)}
    hidden |= dict.fromkeys((str(Path.cwd()), str(Path.home())), HIDDEN)
    for value in sorted(hidden, key=len, reverse=True):
        text = text.replace(value, hidden[value]) if len(value) > 1 else text
    return _PATH.sub(HIDDEN, text)
