"""Replies on their way to a SuperLink: kept apart until they are whole and each piece is true.

A piece is named by the hash of its content, and its content names those that it is made of. What
is in Flower's store is believed for everybody who has the same piece, so nothing of a reply gets
there before all of it came and was held against its names.
"""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    get_object_id,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content

from common.errors import WireError

MOST_PIECES = 160
"""Of one reply: each has up to 5 MB."""
DEEPEST = 8
"""Levels of the pieces of a reply: message, records, record, array, chunks."""
IDLE_S = 120.0
"""After the last piece that came: nobody waits for the next."""
ROOM = 2**20
"""Bytes that a reply may have beside its arrays."""
IN_MEMORY = 2**20
"""Bytes of a reply that are kept in memory; more of it is kept in a file without a name."""


class Incoming:
    """A reply that a node has announced, and what came of it.

    Raises WireError where its tree is none: too large, too deep, or of a piece that is said to be
    made of different things in two places. `most_bytes` of arrays are enough for it.
    """

    def __init__(self, request: Any, folder: Path | None, most_bytes: int) -> None:
        self.request, metadata = request, request.messages_list[0].metadata
        self.node, self.reply_to = request.node.node_id, metadata.reply_to_message_id
        self.message_id = metadata.message_id
        self.lock = threading.Lock()
        self.touched = time.monotonic()
        self.is_done, self.failures = False, 0
        self._most = most_bytes + ROOM
        self._parts = claimed_parts(request.message_object_trees[0])
        self._places: dict[str, tuple[int, int]] = {}
        self._size = 0
        where = str(folder) if folder else None
        self._file = SpooledTemporaryFile(IN_MEMORY, dir=where)  # noqa: SIM115 (kept open)
        weakref.finalize(self, self._file.close)

    def missing(self) -> list[str]:
        """Return the names of the pieces that have not come."""
        return [name for name in self._parts if name not in self._places]

    def take(self, name: str, content: bytes) -> None:
        """Keep a piece; raise WireError where it is none of this reply, or not as was said."""
        if name not in self._parts:
            raise WireError("this piece was not announced.")
        if name in self._places:
            return
        if self._size + len(content) > self._most:
            raise WireError(f"its reply has more than {self._most:,} bytes, which are enough.")
        self._require_true(name, content)
        self._file.seek(self._size)
        self._file.write(content)
        self._places[name] = self._size, len(content)
        self._size += len(content)
        self.touched = time.monotonic()

    def _require_true(self, name: str, content: bytes) -> None:
        if get_object_id(content) != name:
            raise WireError("a piece is named by the hash of its content.")
        try:
            validate_object_content(content)  # else the store would not take it
            kind, parts, _ = get_object_head_values_from_object_content(content)
        except Exception as error:  # whatever a node's bytes make Flower raise
            raise WireError(f"a piece cannot be read: {type(error).__name__}.") from error
        if len(parts) != len(self._parts[name]) or {*parts} != self._parts[name]:
            raise WireError("a piece is not made of what its reply says.")
        if (kind == Message.__name__) != (name == self.message_id):
            raise WireError("a reply is a message, and no piece of it is one.")

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it has come for `IDLE_S`."""
        return self.touched < time.monotonic() - IDLE_S

    def content(self, name: str) -> bytes:
        """Return a piece that came."""
        start, length = self._places[name]
        self._file.seek(start)
        return bytes(self._file.read(length))


class Inbox:
    """The reply that each node hands in at the moment: one after the other, as SuperNodes do."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._open: dict[int, Incoming] = {}
        self._lock = threading.Lock()

    def announce(self, request: Any, most_bytes: int) -> tuple[Incoming, Incoming | None]:
        """Return the reply that is announced, and one to another message that it displaces.

        What is announced again, by a node that did not hear the answer, goes on.
        """
        new = Incoming(request, self._folder, most_bytes)
        with self._lock:
            old = self._open.get(new.node)
            if old and (old.reply_to, old.message_id) == (new.reply_to, new.message_id):
                return old, None
            self._open[new.node] = new
        return new, old if old and old.reply_to != new.reply_to else None

    def find(self, node: int, reply_to: str) -> Incoming | None:
        """Return the reply of a node to a message; None where it hands in none."""
        found = self._open.get(node)
        return found if found and found.reply_to == reply_to else None

    def drop(self, reply: Incoming) -> None:
        """Forget a reply with all that came of it."""
        with self._lock:
            if self._open.get(reply.node) is reply:
                del self._open[reply.node]

    def idle(self) -> list[Incoming]:
        """Return the replies of which nothing has come for `IDLE_S`."""
        return [one for one in list(self._open.values()) if one.is_idle]


def claimed_parts(tree: Any) -> dict[str, set[str]]:
    """Return what each piece of a tree is said to be made of; raise WireError where it is none."""
    found: dict[str, set[str]] = {}
    waiting, count = [(tree, 1)], 0
    while waiting:
        piece, depth = waiting.pop()
        count += 1
        if count > MOST_PIECES or depth > DEEPEST:
            raise WireError(f"a reply has at most {MOST_PIECES} pieces, {DEEPEST} deep.")
        parts = {part.object_id for part in piece.children}
        if len(parts) != len(piece.children) or found.setdefault(piece.object_id, parts) != parts:
            raise WireError("a piece is made of different things, each named once.")
        waiting.extend((part, depth + 1) for part in piece.children)
    return found
