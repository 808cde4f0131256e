"""The guard of a SuperLink, which takes from a node only what a node may say.

Flower checks who asks, and not in whose name the message is that it hands in: a participant could
speak as the SuperLink, to the ServerApp and to other participants; and a time that is no number
stays in its database, where every later pull stumbles over it. It deletes a message whose pieces
have not come yet if its recipient confirms it, stores whatever pieces a node has announced,
believes what a node says of them, and keeps them until the run ends.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from common.errors import WireError
from common.log import logger
from common.messages import LARGEST_REPLY, MOST_SECONDS
from experiments.deploy.pieces import Kept, correct, flat, is_whole, unlink

MOST_PIECES = 160
"""Of one reply: each has up to 5 MB."""
PATIENCE_S = 2.0
"""That a node waits for its own other request to hand in a message."""
OPEN = 8
"""Replies of one node that may be on their way at once."""
MOST_ANNOUNCED = 4
"""How often a reply may be announced: a node that was not answered tries again."""
_ID = re.compile("[0-9a-f]{64}")
DEEPEST = 8
"""Levels of the pieces of a reply: message, records, record, array, chunks."""


class Guard:
    """Stands before Flower's handlers.

    Of the fleet API, where it refuses what a node may not do, and of the server's own, where it
    lets the pieces of messages go.
    """

    def __init__(self, handlers: Any, runtime: Any) -> None:
        self._handlers, self._runtime = handlers, runtime
        self._push_messages = handlers.push_messages
        self._push_object = handlers.push_object
        self._confirm = handlers.confirm_message_received
        self._send, self._collect = runtime.push_messages, runtime.pull_messages
        self._kept = Kept()
        self._sessions: defaultdict[int, deque[str]] = defaultdict(lambda: deque(maxlen=OPEN))
        self._announced: Counter[str] = Counter()
        self._locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._bytes: Counter[int] = Counter()
        self._announcing = threading.Lock()  # between what is known of pieces, and what is noted

    def install(self) -> None:
        """Put this in the place of the handlers."""
        self._handlers.push_messages = self.push_messages
        self._handlers.push_object = self.push_object
        self._handlers.confirm_message_received = self.confirm
        self._runtime.push_messages = self.send
        self._runtime.pull_messages = self.collect

    def push_messages(self, request: Any, state: Any) -> Any:
        """Take one reply at a time from a node."""
        node = request.node.node_id
        with refusing():
            pieces = require_reply(request)
            self._require_own(request, pieces, state)
        metadata = request.messages_list[0].metadata
        with self._alone(node):
            with refusing():
                is_first = self._announce(metadata.reply_to_message_id)
            if is_new := metadata.message_id not in state.object_store:
                # before it is there: the server may take it at once
                self._kept.note_reply(metadata.reply_to_message_id, metadata.message_id)
            try:
                with self._announcing:
                    for piece in {piece.object_id for piece in pieces} - {metadata.message_id}:
                        if self._kept.is_reply(piece):
                            unlink(state.object_store, piece)
                    believed = flat(state.object_store, request.message_object_trees[0])
                    request.message_object_trees[0].CopyFrom(believed)
                    response = self._push_messages(request=request, state=state)
            finally:
                if is_new and metadata.message_id not in state.object_store:  # it was not taken
                    self._kept.forget_reply(metadata.reply_to_message_id, metadata.message_id)
            self._sessions[node].append(response.session_id)
            if is_first and response.objects_to_push:
                self._bytes[node] = 0
            return response

    def _require_own(self, request: Any, pieces: list[Any], state: Any) -> None:
        """Raise WireError where a reply is, or has as a piece, a message of the server's.

        To announce one anew ends the session in which the server pushes it, and others with it. And
        where it answers nothing: Flower would note a session for it before it refuses it.
        """
        if any(piece.object_id in self._kept for piece in pieces):
            raise WireError("a reply is no message of the server's.")
        metadata = request.messages_list[0].metadata
        if state.get_valid_message_ins(metadata.message_id) is not None:  # also of before a restart
            raise WireError("a reply is no message of the server's.")
        reply_to = metadata.reply_to_message_id
        if reply_to not in self._kept and state.get_valid_message_ins(reply_to) is None:
            raise WireError("there is no such message to reply to.")

    def _announce(self, reply_to: str) -> bool:
        """Count the announcements of replies to a message; return whether this is the first.

        Each is written down, piece by piece, while all others wait for the database. Who did not
        hear the answer may announce its reply again. Raises WireError at one too many.
        """
        self._announced[reply_to] += 1
        if self._announced[reply_to] > MOST_ANNOUNCED:
            raise WireError("this reply has been announced before; push its pieces.")
        return self._announced[reply_to] == 1

    def push_object(self, request: Any, state: Any) -> Any:
        """Take no more bytes from a node than its last reply may have."""
        node = request.node.node_id
        with refusing():
            if not request.session_id or request.session_id not in self._sessions[node]:
                raise WireError(f"node {node}: a piece is pushed in the session of its own reply.")
            self._bytes[node] += len(request.object_content)
            if self._bytes[node] > LARGEST_REPLY:
                raise WireError(f"node {node}: its reply has more than {LARGEST_REPLY:,} bytes.")
        return self._push_object(request=request, state=state)

    def confirm(self, request: Any, state: Any, store: Any) -> Any:
        """Let a message go when all of it is here; before that nobody can have received it."""
        message_id = request.message_object_id
        with self._alone(request.node.node_id):
            with refusing():
                if message_id in store and not is_whole(store, message_id):
                    raise WireError(f"{message_id} is confirmed before all of it is there.")
            return self._confirm(request=request, state=state, store=store)

    def send(self, request: Any, state: Any, task: Any) -> Any:
        """Take the server's messages, whatever a node has said of their pieces before."""
        with self._announcing:
            for tree in request.message_object_trees:
                correct(state.object_store, tree)
            for message in request.messages_list:
                metadata = message.metadata
                self._kept.note_sent(metadata.message_id, metadata.created_at + metadata.ttl)
            return self._send(request, state, task)

    def collect(self, request: Any, state: Any, task: Any) -> Any:
        """Give the server what has come; what is answered, or was never, leaves no pieces."""
        with state.session():  # what is taken and not deleted would be lost
            response = self._collect(request, state, task)
        try:
            for message in response.messages_list:
                metadata = message.metadata
                self._announced.pop(metadata.reply_to_message_id, None)
                self._kept.close(
                    state.object_store, metadata.reply_to_message_id, reply=metadata.message_id
                )
            self._kept.close_old(state.object_store, time.time())
        except Exception as error:  # pieces that stay cost space, an error the replies
            logger.warning("Pieces of messages that are over stay for now: %s", error)
        return response

    @contextmanager
    def _alone(self, node: int) -> Iterator[None]:
        """Serve a node's requests of one kind one after the other."""
        with refusing():
            if not self._locks[node].acquire(timeout=PATIENCE_S):
                raise WireError(f"node {node} hands in several messages at once.")
        try:
            yield
        finally:
            self._locks[node].release()


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a WireError into what the node is told."""
    from flwr.supercore.error import ApiErrorCode, FlowerError

    try:
        yield
    except WireError as error:
        raise FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, str(error)) from error


def require_reply(request: Any) -> list[Any]:
    """Return the pieces of a PushMessagesRequest that is one reply, in the name of who sends it.

    Raises WireError where it is anything else.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise WireError("a node hands in one message at a time, with one tree of its pieces.")
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    node = request.node.node_id
    if metadata.src_node_id != node or metadata.dst_node_id != SUPERLINK_NODE_ID:
        raise WireError(
            f"node {node} hands in a message from {metadata.src_node_id} to "
            f"{metadata.dst_node_id}; it may send from itself to {SUPERLINK_NODE_ID} alone."
        )
    if not _ID.fullmatch(metadata.reply_to_message_id):
        raise WireError(f"node {node} hands in a message that answers none.")
    if metadata.message_id == metadata.reply_to_message_id:
        raise WireError(f"node {node} hands in a message as the reply to itself.")
    if not (math.isfinite(metadata.created_at) and 0 < metadata.ttl < math.inf):
        raise WireError(f"node {node}: created_at and ttl must be finite numbers.")
    if metadata.message_id != tree.object_id:
        raise WireError(f"node {node}: the pieces are of another message.")
    if not all(0 <= seconds <= MOST_SECONDS for seconds in request.clientapp_runtime_list):
        raise WireError(f"node {node}: a running time is no number of seconds.")
    pieces = pieces_of(tree)
    if len(pieces) > MOST_PIECES:
        raise WireError(f"node {node}: a reply has at most {MOST_PIECES} pieces, {DEEPEST} deep.")
    empty = empty_records()
    if any(piece.object_id in empty and piece.children for piece in pieces):
        raise WireError(f"node {node}: an empty record has no pieces.")
    return pieces


def pieces_of(tree: Any) -> list[Any]:
    """Return the pieces of a reply; one more than `MOST_PIECES` of what is larger or too deep."""
    waiting: list[tuple[Any, int]] = [(tree, 1)]
    found: list[Any] = []
    while waiting and len(found) <= MOST_PIECES:
        piece, depth = waiting.pop()
        if depth > DEEPEST:
            return [tree] * (MOST_PIECES + 1)
        found.append(piece)
        waiting.extend((child, depth + 1) for child in piece.children)
    return found


@cache
def empty_records() -> frozenset[str]:
    """Return the ids of records that hold nothing: they are in everybody's messages.

    Who registers one with pieces would spoil every later reply that has it.
    """
    records = (ArrayRecord(), ConfigRecord(), MetricRecord(), RecordDict())
    return frozenset(record.object_id for record in records)
