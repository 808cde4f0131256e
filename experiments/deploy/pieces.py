"""The pieces that messages are made of, at a SuperLink: right, and kept no longer than needed.

Flower takes a node's word for what a piece is made of: who says so first, of a piece that others
will have as well (a vector that everybody gets), spoils it for all of them. It also keeps the
pieces of messages that were never confirmed, and of replies that came too late, until the run ends.
"""

from __future__ import annotations

from typing import Any

from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from sqlalchemy import delete, insert, select, update

from common.errors import WireError

GRACE_S = 600.0
"""After the time to live of a message, in which its reply may still be fetched."""


def correct(store: SqlObjectStore, tree: Any) -> None:
    """Let a message of the server's decide what its pieces are made of, where nobody has proved it.

    A piece that is not there yet is made of what this tree says. One that is there has been held
    against its own content (`require_true`).
    """
    unlinked = set()
    with store._mutation_session() as session:
        for node in iterate_object_tree(tree):  # children first
            there = session.scalar(_facts(StoredObject.is_available, node.object_id))
            if there:
                continue
            if there is None:
                session.execute(insert(StoredObject).values(_empty(node.object_id)))
            wanted = {child.object_id for child in node.children}
            found = set(session.scalars(_children(node.object_id)))
            changes = dict.fromkeys(found - wanted, -1) | dict.fromkeys(wanted - found, 1)
            for child, change in changes.items():
                link = {"parent_id": node.object_id, "child_id": child}
                if change > 0:
                    session.execute(insert(ObjectChild).values(link))
                else:
                    unlinked.add(child)
                    session.execute(delete(ObjectChild).filter_by(**link))
                session.execute(
                    update(StoredObject)
                    .where(StoredObject.object_id == child, StoredObject.ref_count + change >= 0)
                    .values(ref_count=StoredObject.ref_count + change)
                )
    for child in unlinked:  # nobody's now, unless somebody else has it
        store.delete(child)


def require_true(store: SqlObjectStore, piece: str, content: bytes) -> None:
    """Raise WireError unless a piece is made of what was said of it when it was announced."""
    with store.session() as session:
        said = set(session.scalars(_children(piece)))
    try:
        names = set(get_object_children_ids_from_object_content(content))
    except Exception as error:  # a node made it up: whatever it makes Flower raise
        raise WireError(f"a piece cannot be read: {type(error).__name__}.") from error
    if names != said:
        raise WireError("a piece is made of others than were announced.")


def is_whole(store: SqlObjectStore, message_id: str) -> bool:
    """Whether all pieces of a message are there; none is read."""
    waiting, seen = [message_id], {message_id}
    with store.session() as session:
        while waiting:
            piece = waiting.pop()
            if not session.scalar(_facts(StoredObject.is_available, piece)):
                return False
            new = set(session.scalars(_children(piece))) - seen
            seen |= new
            waiting.extend(new)
    return True


def _children(piece: str) -> Any:
    return select(ObjectChild.child_id).where(ObjectChild.parent_id == piece)


def _facts(column: Any, piece: str) -> Any:
    return select(column).where(StoredObject.object_id == piece)


def _empty(piece: str) -> dict[str, Any]:
    return {"object_id": piece, "content": b"", "is_available": 0, "ref_count": 0}


class Kept:
    """Which messages have pieces at the SuperLink: they go with the message.

    `sent` has, for each message of the server's, when it is over; `replies` what nodes have handed
    in to it. Both forget a message with its pieces.
    """

    def __init__(self) -> None:
        self._sent: dict[str, float] = {}
        self._replies: dict[str, set[str]] = {}

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._sent

    def note_sent(self, message_id: str, over: float) -> None:
        """Note a message of the server's, and the time, in seconds, when nobody waits for it."""
        self._sent[message_id] = over

    def note_reply(self, reply_to: str, message_id: str) -> None:
        """Note that a node hands in a reply."""
        self._replies.setdefault(reply_to, set()).add(message_id)

    def forget_reply(self, reply_to: str, message_id: str) -> None:
        """Forget a reply that was not taken."""
        known = self._replies.get(reply_to, set())
        known.discard(message_id)
        if not known:
            self._replies.pop(reply_to, None)

    def close(self, store: SqlObjectStore, message_id: str, reply: str = "") -> None:
        """Delete the pieces of a message that is over, and of all replies to it but one."""
        self._sent.pop(message_id, None)
        store.delete(message_id)
        for late in self._replies.pop(message_id, set()) - {reply}:
            store.delete(late)

    def close_old(self, store: SqlObjectStore, now: float) -> None:
        """Close the messages that nobody has asked after."""
        for message_id in [m for m, over in self._sent.items() if over + GRACE_S < now]:
            self.close(store, message_id)
