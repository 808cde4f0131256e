"""What an error of a deployed participant may say to the server."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, MHpFedHNError, WireError

HIDDEN = "<path>"
KNOWN = ("client-id", "head-tag")
"""What a participant declares and a server is told, or that is nothing but a word."""
SPOKEN = (ConfigError, WireError)
"""Errors about what both sides know. Those of data, models and code may name files and layers."""
MOST_TEXT = 4000
"""Letters of an error that are told; a server can make it repeat what the server has said."""
LEAST_GUESS = 4
"""Letters of a server's text that could be a guess of something."""

TELLING = re.compile(r"[/\\:.\s]")
"""What a declared text has in it that may name a folder, a module or a file."""
_FURTHER = r"(?:[/\\][^\s'\":;,()]*)?"
_PATH = re.compile(r"(?<![\w:/.<>])(?:~?/|[A-Za-z]:\\)[^\s'\":;,()]+")

Spans = list[tuple[int, int, str]]
"""Parts of a text, from one place to another, and what stands for each."""


def outgoing_error(
    error: Exception, node_config: Mapping[str, Any], run_config: Mapping[str, Any]
) -> MHpFedHNError:
    """Return the error that leaves a participant: no paths, no layer names, no traceback.

    The whole error belongs in the participant's own log.
    """
    if isinstance(error, SPOKEN):
        return type(error)(without_paths(str(error), node_config, run_config))
    kind = type(error).__name__
    return MHpFedHNError(
        f"{kind} on the participant's side. Its own log says why; ask whoever runs it."
    )


def without_paths(
    text: str, node_config: Mapping[str, Any], run_config: Mapping[str, Any] | None = None
) -> str:
    """Replace absolute paths, and what the participant declared: folders, modules, files.

    Those may be relative, be a share's, or hold blanks. Its name is known to the server. Where the
    text repeats what the server's run config says, that is replaced whole, whatever is in it: else
    the server would learn that it has guessed a path. It cannot cut one in two either.
    """
    own = {str(v): f"<{key}>" for key, v in node_config.items() if key not in KNOWN}
    own |= dict.fromkeys((str(Path.cwd()), str(Path.home())), HIDDEN)
    paths: Spans = [(*found.span(), HIDDEN) for found in _PATH.finditer(text)]
    hidden = _merged([*paths, *_found(text, own, least=2, further=_FURTHER)])
    asked = {str(v): f"<the run's {key}>" for key, v in (run_config or {}).items()}
    said = _merged(_found(text, asked, least=LEAST_GUESS))
    starts, ends = [start for start, _, _ in hidden], [end for _, end, _ in hidden]

    def cuts(place: int) -> bool:
        """Whether it is within something hidden."""
        before = bisect_left(starts, place) - 1
        return before >= 0 and place < ends[before]

    whole = [span for span in said if not cuts(span[0]) and not cuts(span[1])]
    return _replaced(text, _merged([*whole, *hidden]))[:MOST_TEXT]


def _found(text: str, values: Mapping[str, str], *, least: int, further: str = "") -> Spans:
    """Return where telling values are in a text, as they are or as Python writes them."""
    spans: Spans = []
    for value, name in values.items():
        for written in {value, repr(value)[1:-1]}:
            if len(written) >= least and TELLING.search(value):
                pattern = re.compile(re.escape(written) + further)
                spans += [(*found.span(), name) for found in pattern.finditer(text)]
    return spans


def _merged(spans: Iterable[tuple[int, int, str]]) -> Spans:
    """Return what covers the same without overlaps: of those that overlap, the first names it."""
    merged: Spans = []
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        if merged and start < merged[-1][1]:
            first, before, its = merged[-1]
            merged[-1] = (first, max(before, end), its)
        else:
            merged.append((start, end, name))
    return merged


def _replaced(text: str, spans: Spans) -> str:
    parts, place = [], 0
    for start, end, name in spans:
        parts += [text[place:start], name]
        place = end
    return "".join([*parts, text[place:]])
