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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesResponse, Reconnect
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.utils import int64_to_uint64
from sqlalchemy.exc import SQLAlchemyError

from common.errors import WireError
from common.inflation import most_bytes_of
from common.log import logger
from common.messages import MOST_SECONDS
from experiments.deploy.inbox import Inbox, Incoming
from experiments.deploy.pieces import Kept, is_answered, is_given, is_whole

_ID = re.compile("[0-9a-f]{64}")
MOST_WAITING = 8
"""Replies whose turn it is to be stored next: each holds a thread that others need."""
MOST_FAILURES = 3
"""Times that the database may refuse a reply."""
LONG_S = 0.5
"""A reply that takes longer to store has kept others from the database."""


class BusyError(Exception):
    """What is asked has to be asked again: HTTP 503, after which Flower does so."""


class NotStoredError(BusyError):
    """The database did not take something."""


class Guard:
    """Stands before Flower's handlers.

    Of the fleet API, where a node gets its own messages alone and a reply waits in an inbox until
    it is whole and true, and of the server's own, where it lets the pieces of messages go. The
    inbox keeps large replies in `folder` (None: where temporary files are).
    """

    def __init__(self, handlers: Any, runtime: Any, folder: Path | None = None) -> None:
        self._handlers, self._runtime = handlers, runtime
        self._push_messages = handlers.push_messages
        self._pull_messages, self._pull_object = handlers.pull_messages, handlers.pull_object
        self._confirm = handlers.confirm_message_received
        self._send, self._collect = runtime.push_messages, runtime.pull_messages
        self._kept, self._inbox = Kept(), Inbox(folder)
        self._storing, self._waiting = threading.Lock(), threading.Semaphore(MOST_WAITING)
        self._given: dict[int, set[str]] = {}  # the pieces of each node's newest message

    def install(self) -> None:
        """Put this in the place of the handlers."""
        self._handlers.pull_messages = self.pull_messages
        self._handlers.pull_object = self.pull_object
        self._handlers.push_messages = self.push_messages
        self._handlers.push_object = self.push_object
        self._handlers.confirm_message_received = self.confirm
        self._runtime.push_messages = self.send
        self._runtime.pull_messages = self.collect

    def pull_messages(self, request: Any, state: Any, store: Any) -> Any:
        """Give a node its message, and note which pieces are in it."""
        response = self._pull_messages(request=request, state=state, store=store)
        if trees := response.message_object_trees:
            names = {piece.object_id for tree in trees for piece in iterate_object_tree(tree)}
            self._given[request.node.node_id] = names
        return response

    def pull_object(self, request: Any, state: Any) -> Any:
        """Give a node the pieces of its own messages: who guesses others' would learn of them."""
        node, name = request.node.node_id, request.object_id
        if name in self._given.get(node, ()) or is_given(state, node, name):
            return self._pull_object(request=request, state=state)
        return PullObjectResponse(object_found=False, object_available=False)

    def push_messages(self, request: Any, state: Any) -> Any:
        """Let a node announce its reply, and say which pieces it is to push."""
        with refusing():
            require_reply(request)
            metadata = request.messages_list[0].metadata
            most = self._require_asked(metadata, request.node.node_id, state)
            wanted: list[str] = []
            if not is_answered(state, metadata.reply_to_message_id):  # else: it did not hear of it
                reply, displaced = self._inbox.announce(request, most)
                if displaced:
                    self._give_up(state, displaced)
                wanted = self._advance(reply, state)
        return PushMessagesResponse(
            reconnect=Reconnect(reconnect=5),
            results={metadata.message_id: 0},
            objects_to_push=wanted,
            session_id=metadata.reply_to_message_id,
        )

    def _require_asked(self, metadata: Any, node: int, state: Any) -> int:
        """Return how many bytes of arrays a reply may bring.

        Raises WireError where it is a message of the server's, or answers none to its node. To
        announce one anew would end the session in which the server pushes it, and others.
        """
        known = metadata.message_id in self._kept
        if known or state.get_valid_message_ins(metadata.message_id) is not None:
            raise WireError("a reply is no message of the server's.")
        if (asked := message_to(state, metadata.reply_to_message_id, node)) is None:
            raise WireError("there is no such message to reply to.")
        return most_bytes_of(str(asked["group_id"]))

    def push_object(self, request: Any, state: Any) -> Any:
        """Take a piece of a node's reply; the last one hands all of it over."""
        node, reply_to = request.node.node_id, request.session_id
        with refusing():
            reply = self._inbox.find(node, reply_to)
            if reply is not None:
                self._advance(reply, state, request)
            elif message_to(state, reply_to, node) is None or not is_answered(state, reply_to):
                self._not_coming(state, node, reply_to)  # announced before a restart, or never
                raise WireError(f"node {node}: a piece is pushed after its reply was announced.")
        return PushObjectResponse(stored=True)

    def _advance(self, reply: Incoming, state: Any, piece: Any = None) -> list[str]:
        """Take a piece, if one came, and hand a whole reply over; return what is missing yet.

        A reply that is none is given up, and one that the database has refused too often.
        """
        try:
            with reply.lock:
                if piece is not None:
                    reply.take(piece.object_id, piece.object_content)
                if not (wanted := reply.missing()) and not reply.is_done:
                    self._hand_over(reply, state)
                return wanted
        except (SQLAlchemyError, BusyError):
            if reply.failures >= MOST_FAILURES:
                self._give_up(state, reply)
            raise
        except (WireError, OSError) as error:  # the second: there is no room for it
            self._give_up(state, reply)
            raise WireError(f"node {reply.node}: {error}") from error

    def _hand_over(self, reply: Incoming, state: Any) -> None:
        """Store a whole reply with all its pieces, or nothing of it; once."""
        self._kept.note_reply(reply.reply_to, reply.message_id)  # the server may take it at once
        try:
            with self._turn(), state.session():
                store_whole(reply, self._push_messages(request=reply.request, state=state), state)
        except Exception as error:
            self._kept.forget_reply(reply.reply_to, reply.message_id)
            if isinstance(error, SQLAlchemyError | NotStoredError):
                reply.failures += 1
            if isinstance(error, FlowerError | SQLAlchemyError | WireError | BusyError):
                raise  # of the run, the database, the reply
            # whatever a node's claims make Flower raise
            raise WireError(f"it is no reply: {type(error).__name__}: {error}") from error
        reply.is_done = True
        self._inbox.drop(reply)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for one's turn to store a reply; raise BusyError where many wait.

        One after the other, with a pause after one that took its time: whoever waits for the
        database meanwhile gets it.
        """
        if not self._waiting.acquire(blocking=False):
            raise BusyError("many replies are waiting to be stored.")
        try:
            with self._storing:
                started = time.monotonic()
                try:
                    yield
                finally:
                    if time.monotonic() - started > LONG_S:
                        time.sleep(LONG_S)
        finally:
            self._waiting.release()

    def _give_up(self, state: Any, reply: Incoming, *, idle: bool = False) -> None:
        """Forget a reply that will not come, and tell the server; an idle one, if it still is."""
        with reply.lock:
            if reply.is_done or (idle and not reply.is_idle):
                return
            self._inbox.drop(reply)
            self._not_coming(state, reply.node, reply.reply_to)

    def _not_coming(self, state: Any, node: int, reply_to: str) -> None:
        """Let the server know that a node's reply will not come: it waits for it no longer.

        A message that the server still pushes is not deleted under its hands.
        """
        asked = message_to(state, reply_to, node) is not None
        if asked and not is_answered(state, reply_to) and is_whole(state.object_store, reply_to):
            state.delete_messages(message_ins_ids={reply_to})
            self._kept.close(state.object_store, reply_to)

    def confirm(self, request: Any, state: Any, store: Any) -> Any:
        """Let a message go when all of it is here; before that nobody can have received it."""
        message_id = request.message_object_id
        with refusing():
            if message_id in store and not is_whole(store, message_id):
                raise WireError(f"{message_id} is confirmed before all of it is there.")
        return self._confirm(request=request, state=state, store=store)

    def send(self, request: Any, state: Any, task: Any) -> Any:
        """Take the server's messages, and note when they are over."""
        for message in request.messages_list:
            metadata = message.metadata
            self._kept.note_sent(metadata.message_id, metadata.created_at + metadata.ttl)
        return self._send(request, state, task)

    def collect(self, request: Any, state: Any, task: Any) -> Any:
        """Give the server what has come; what is answered, or was never, leaves no pieces."""
        for reply in self._inbox.idle():
            self._give_up(state, reply, idle=True)
        with state.session():  # what is taken and not deleted would be lost
            response = self._collect(request, state, task)
        try:
            for message in response.messages_list:
                metadata = message.metadata
                self._kept.close(
                    state.object_store, metadata.reply_to_message_id, reply=metadata.message_id
                )
            self._kept.close_old(state.object_store, time.time())
        except Exception as error:  # pieces that stay cost space, an error the replies
            logger.warning("Pieces of messages that are over stay for now: %s", error)
        return response


def message_to(state: Any, message_id: str, node: int) -> Any:
    """Return a message of the server's that this node may answer, None where there is none."""
    message = state.get_valid_message_ins(message_id)
    mine = message is not None and int64_to_uint64(message["dst_node_id"]) == node
    return message if mine else None


def store_whole(reply: Incoming, response: Any, state: Any) -> None:
    """Store the pieces of a reply that Flower wants; raise WireError where it took no reply."""
    run_id = reply.request.messages_list[0].metadata.run_id
    for name in dict.fromkeys(response.objects_to_push):  # one in two places is named twice
        if not state.store_object(run_id, response.session_id, name, reply.content(name)):
            raise NotStoredError("a piece was not stored.")  # Flower says no more of any error
    if reply.message_id not in state.object_store:  # for the time it claims, or one was before it
        raise WireError("the reply was not taken.")


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a WireError into what the node is told."""
    try:
        yield
    except WireError as error:
        raise FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, str(error)) from error


def require_reply(request: Any) -> None:
    """Raise WireError where a PushMessagesRequest is not one reply, in the name of who sends it."""
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
