"""The pieces that messages are made of, at a SuperLink: kept no longer than needed.

Flower keeps the pieces of messages that were never confirmed, and of replies that came too late,
until the run ends.
"""

from __future__ import annotations

from typing import Any

from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import select

GRACE_S = 600.0
"""After the time to live of a message, in which its reply may still be fetched."""


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


def is_given(state: Any, node: int, piece: str) -> bool:
    """Whether a piece is in a message of the server's to this node; others may have it too."""
    found = select(MessageIns.message_id).where(
        MessageIns.dst_node_id == uint64_to_int64(node), MessageIns.delivered_at != ""
    )
    with state.session() as session:
        waiting = list(session.scalars(found))
        seen = {*waiting}
        while waiting and piece not in seen:
            new = set(session.scalars(_children(waiting.pop()))) - seen
            seen |= new
            waiting.extend(new)
    return piece in seen


def is_answered(state: Any, message_id: str) -> bool:
    """Whether a reply to a message is in the database: all of it, for it is stored at once."""
    found = select(MessageRes.message_id).where(MessageRes.reply_to_message_id == message_id)
    with state.session() as session:
        return session.scalar(found) is not None


def _children(piece: str) -> Any:
    return select(ObjectChild.child_id).where(ObjectChild.parent_id == piece)


def _facts(column: Any, piece: str) -> Any:
    return select(column).where(StoredObject.object_id == piece)


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

    def is_answered(self, message_id: str) -> bool:
        """Whether a node has handed in a reply to this."""
        return message_id in self._replies

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
