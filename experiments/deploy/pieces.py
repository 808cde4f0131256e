"""The pieces that messages are made of, at a SuperLink: right, and kept no longer than needed.

Flower takes a node's word for what a piece is made of: who says so first, of a piece that others
will have as well (a vector that everybody gets), would spoil it for all of them. It also keeps the
pieces of messages that were never confirmed, and of replies that came too late, until the run ends.
"""

from __future__ import annotations

from typing import Any

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from common.errors import WireError

GRACE_S = 600.0
"""After the time to live of a message, in which its reply may still be fetched."""


def correct(store: SqlObjectStore, tree: Any) -> None:
    """Let a message of the server's say what its pieces are made of, before they are there.

    Of one that is there its own content has said it (`prove`).
    """
    with store._mutation_session() as session:
        for node in iterate_object_tree(tree):  # children first
            there = session.scalar(_facts(StoredObject.is_available, node.object_id))
            if there is None:
                session.execute(insert(StoredObject).values(_empty(node.object_id)))
            if not there:
                _link(session, node.object_id, {child.object_id for child in node.children})


def flat(store: SqlObjectStore, tree: Any) -> Any:
    """Return the tree of a node's reply in which nothing is believed of its pieces.

    All of them hang on the message itself; what one is made of is what is known already, or nothing
    until its content says it (`prove`). Else who announces first a piece that others will have
    (zeros in a row) could have theirs refused.
    """
    pieces = dict.fromkeys(node.object_id for node in iterate_object_tree(tree))
    del pieces[tree.object_id]
    known = [
        store.get_object_tree(name) if name in store else ObjectTree(object_id=name)
        for name in pieces
    ]
    return ObjectTree(object_id=tree.object_id, children=known)


def prove(store: SqlObjectStore, piece: str, content: bytes) -> None:
    """Note what a piece is made of, by its content; raise WireError where that is not announced."""
    try:
        names = set(get_object_children_ids_from_object_content(content))
    except Exception as error:  # a node made it up: whatever it makes Flower raise
        raise WireError(f"a piece cannot be read: {type(error).__name__}.") from error
    if get_object_id(content) != piece:
        raise WireError("a piece is another than its name says.")
    with store._mutation_session() as session:
        if session.scalar(_facts(StoredObject.is_available, piece)):
            return
        if any(session.scalar(_facts(StoredObject.object_id, name)) is None for name in names):
            raise WireError("a piece is made of others than were announced.")
        _link(session, piece, names)


def _link(session: Session, piece: str, names: set[str]) -> None:
    """Note that a piece is made of others, of which it may be known already."""
    for name in names - set(session.scalars(_children(piece))):
        session.execute(insert(ObjectChild).values(parent_id=piece, child_id=name))
        session.execute(
            update(StoredObject)
            .where(StoredObject.object_id == name)
            .values(ref_count=StoredObject.ref_count + 1)
        )


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
