"""The pieces that messages are made of, at a SuperLink: right, and kept no longer than needed.

Flower takes a node's word for what a piece is made of: who says so first, of a piece that others
will have as well (a vector that everybody gets), would spoil it for all of them. It also keeps the
pieces of messages that were never confirmed, and of replies that came too late, until the run ends.
"""

from __future__ import annotations

from typing import Any

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    iterate_object_tree,
)
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from sqlalchemy import delete, insert, select, update

GRACE_S = 600.0
"""After the time to live of a message, in which its reply may still be fetched."""


def correct(store: SqlObjectStore, tree: Any) -> None:
    """Note what the pieces of a message of the server's are made of, whoever has announced them.

    A piece's name is the hash of its content, so that it cannot be made of anything else.
    """
    with store._mutation_session() as session:
        for node in iterate_object_tree(tree):  # children first
            if session.scalar(_facts(StoredObject.object_id, node.object_id)) is None:
                session.execute(insert(StoredObject).values(_empty(node.object_id)))
            names = {child.object_id for child in node.children}
            for name in names - set(session.scalars(_children(node.object_id))):
                link = {"parent_id": node.object_id, "child_id": name}
                session.execute(insert(ObjectChild).values(link))
                session.execute(
                    update(StoredObject)
                    .where(StoredObject.object_id == name)
                    .values(ref_count=StoredObject.ref_count + 1)
                )


def flat(store: SqlObjectStore, tree: Any) -> Any:
    """Return the tree of a node's reply in which nothing is believed of its pieces.

    All of them hang on the reply itself; what one is made of is what the server has said of it
    (`correct`), or nothing. Else who announces first a piece that others will have (zeros in a row)
    could have theirs refused; and what pieces say of each other could be unfolded without end.
    """
    pieces = dict.fromkeys(node.object_id for node in iterate_object_tree(tree))
    del pieces[tree.object_id]

    def known(name: str) -> Any:
        parts = [known(part) for part in session.scalars(_children(name)).all()]
        return ObjectTree(object_id=name, children=parts)

    with store.session() as session:
        return ObjectTree(object_id=tree.object_id, children=[known(name) for name in pieces])


def unlink(store: SqlObjectStore, piece: str) -> None:
    """Take back what a node has said of a piece that it called its reply; not of one that is there.

    A reply is part of no other, and nobody can guess the name of another's.
    """
    with store._mutation_session() as session:
        if session.scalar(_facts(StoredObject.is_available, piece)):
            return
        parts = list(session.scalars(_children(piece)))
        session.execute(delete(ObjectChild).where(ObjectChild.parent_id == piece))
        session.execute(
            update(StoredObject)
            .where(StoredObject.object_id.in_(parts), StoredObject.ref_count > 0)
            .values(ref_count=StoredObject.ref_count - 1)
        )
    for part in parts:
        store.delete(part)


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

    def is_reply(self, message_id: str) -> bool:
        """Whether a node has called this its reply."""
        return any(message_id in replies for replies in self._replies.values())

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
