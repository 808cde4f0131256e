"""The guard of a participant's SuperNode: its messages are answered, by the app that came.

Flower waits without end for the reply of a ClientApp that ended before it gave one; a SuperNode
that waits looks alive, and takes no further message of any run. It starts an app for a message
before it has it, and where it does not get it, keeps what the app replies. It loads an app, whose
content it has verified, from the folder of a name and version that the server states. It sends back
a message that calls itself a reply, and starts an app for it; and messages, and what a run says of
itself, may be of any size.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from flwr.app import Message, Metadata
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.constant import Status
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as worker
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import (
    CLIENT_APP_CRASHED_ERROR,
    InMemoryNodeState,
    MessageEntry,
)

from common.errors import WireError
from common.files import printable
from common.inflation import FEW, PIECE, require_size
from common.log import logger
from common.messages import LARGEST_REPLY
from experiments.deploy.superlink import on_a_line

_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}")
"""Of a folder's name: it leads nowhere."""
MOST_CONFIG = 1 << 16
"""Letters of a run's configuration."""
MOST_RUNS = 16
"""Runs that a SuperNode remembers; of another it asks again."""
MOST_PIECES = FEW + LARGEST_REPLY // PIECE
"""Of a message, as of a reply."""
UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def install() -> None:
    """Put this guard before Flower's SuperNode, in this process."""
    logging.getLogger("flwr").addFilter(on_a_line)  # else a server's text begins a line of its own
    vars(nodestate_factory)["InMemoryNodeState"] = AnsweringState
    for name, guarded in (
        ("get_fused_config_from_fab", _config),
        ("_pull_and_store_message", pull),
    ):
        vars(worker)[name] = partial(guarded, vars(worker)[name])


class RefusedError(Exception):
    """A message is of a run, or of a size, that is not taken; it is answered so."""


def require_same_app(run: Run, content: bytes) -> None:
    """Raise RefusedError unless a run is of this app, by name, version and content."""
    name, version = get_fab_metadata(content)
    stated = (run.fab_id, run.fab_version, run.fab_hash)
    if stated != (name, version, hashlib.sha256(content).hexdigest()):
        raise RefusedError(f"the server states another app, {stated}, than {name} {version}")
    parts = (*name.split("/"), version)
    if len(parts) != 3 or not all(map(_PART.fullmatch, parts)):
        raise RefusedError(f"{name!r}, {version!r} cannot name a folder")


def pull(flower: Callable[..., int | None], **known: Any) -> int | None:
    """Take a message as Flower does, if it is one to this node; answer what is refused."""
    incoming, state = Incoming(known), known["state"]
    state.is_taking = True
    try:
        run_id = flower(**known | incoming.guarded())
    except RefusedError as error:
        logger.error("a message is refused: %s", printable(str(error))[:1000])
        reply = Message(worker.FAB_VERIFICATION_ERROR, reply_to=incoming.message)
        worker._insert_message(reply, state, known["object_store"])
        run_id = incoming.message.metadata.run_id
    finally:
        state.is_taking = False
    if run_id is not None:
        state.note_asked(incoming.message)
    return run_id


class Incoming:
    """A message on its way in, between Flower and what fetches it for Flower."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known, self._bytes = known, 0

    def guarded(self) -> dict[str, Any]:
        """Return what stands in the place of Flower's functions, by name."""
        return {
            "receive": self._receive,
            "pull_object": self._pull,
            "confirm_message_received": self._confirm,
        }

    def _receive(self) -> Any:
        if (found := self._known["receive"]()) is None:
            return None
        self.message, self._tree = found
        if not self._is_asked(self.message.metadata):
            logger.error("a message that is no question to this participant is passed over")
            return None
        if len([*islice(iterate_object_tree(self._tree), MOST_PIECES + 1)]) > MOST_PIECES:
            raise RefusedError(f"a message has more than {MOST_PIECES} pieces")
        if self._tree.object_id != self.message.metadata.message_id:
            raise RefusedError("a message's pieces are those of another")  # none would forget them
        return found

    def _is_asked(self, metadata: Metadata) -> bool:
        own = self._known["state"].get_node_id()
        is_question = metadata.message_id and not metadata.reply_to_message_id
        return bool(is_question and metadata.dst_node_id == own)

    def _pull(self, run_id: int, name: str) -> Any:
        content = self._known["pull_object"](run_id, name)
        self._bytes += len(content)
        if self._bytes > LARGEST_REPLY:
            raise WireError(f"the message has more than {LARGEST_REPLY:,} bytes.")
        return content

    def _confirm(self, run_id: int, message_id: str) -> None:
        """Confirm a message, unless it is larger, put together, than its pieces are."""
        names = {piece.object_id for piece in iterate_object_tree(self._tree)}
        store = self._known["object_store"]
        require_size({name: store.get(name) for name in names}, LARGEST_REPLY)
        self._known["confirm_message_received"](run_id, message_id)


def _config(flower: Callable[..., Any], content: bytes, run: Run) -> Any:
    require_same_app(run, content)  # Flower has verified it, and stores what the server states
    try:
        config = flower(content, run)
    except ValueError as error:  # a key that the app does not have would end the SuperNode
        raise RefusedError(f"the run's configuration: {error}") from None
    size = sum(len(str(key)) + len(str(value)) for key, value in config.items())
    if size > MOST_CONFIG:
        raise RefusedError(f"the run's configuration has {size:,} letters")
    return config


def _keep_newest(known: dict[Any, Any]) -> None:
    for oldest in [*known][:-MOST_RUNS]:
        del known[oldest]


class AnsweringState(InMemoryNodeState):
    """What a SuperNode knows; every message in it is answered once no task is at work on it."""

    is_taking = False
    """Whether a message is on its way in; then no app begins, and so none replies to a part."""

    def claim_task(self, task_id: int) -> str | None:
        """Give out a task, unless its message may not be there yet; the SuperExec asks again."""
        return None if self.is_taking else super().claim_task(task_id)

    def note_asked(self, message: Message) -> None:
        """Remember a message that was answered before any app could take it."""
        with self.lock_msg_store:
            entry = MessageEntry(message, is_retrieved=True)
            self.msg_store.setdefault(message.metadata.message_id, entry)

    def store_run(self, run: Run) -> None:
        """Remember a run, and forget the oldest."""
        super().store_run(run)
        with self.lock_run_store, self.lock_run_series_context_store:
            for known in (self.run_store, self.run_series_context_store):
                _keep_newest(known)

    def store_fab(self, fab: Fab) -> str:
        """Remember an app, and forget the oldest."""
        name = super().store_fab(fab)
        with self.lock_fab_store:
            _keep_newest(self.fab_store)
        return name

    def get_messages_legacy(
        self,
        *,
        run_ids: Sequence[int] | None = None,
        is_reply: bool | None = None,
        limit: int | None = None,
    ) -> Sequence[Message]:
        """Return messages; of replies those that are whole, to a message that is known.

        A task may end before it takes its message, while it reads it, or in the midst of its reply;
        and a message may be forgotten while its task is at work.
        """
        if is_reply:
            at_work = {task.run_id for task in self.get_tasks(statuses=UNFINISHED)}
            with self.lock_msg_store:
                self._forget_unasked()
                self._answer_for_ended(at_work)
                if not all(map(self._is_whole, self._replies().values())):
                    return []  # its task is at work, or else it would be an error by now
        return super().get_messages_legacy(run_ids=run_ids, is_reply=is_reply, limit=limit)

    def _replies(self) -> dict[str, str]:
        """Return the ids of the replies by that of the message that each answers."""
        found = [entry.message.metadata for entry in self.msg_store.values()]
        return {x.reply_to_message_id: x.message_id for x in found if x.reply_to_message_id}

    def _forget_unasked(self) -> None:
        """Delete the replies to what nobody waits for."""
        for name, entry in [*self.msg_store.items()]:
            asked = entry.message.metadata.reply_to_message_id
            if asked and asked not in self.msg_store:
                self._forget(name)

    def _forget(self, message_id: str) -> None:
        self.delete_messages(message_ids=[message_id])
        self.object_store.delete(message_id)

    def _answer_for_ended(self, at_work: set[int]) -> None:
        """Answer with an error what a run without a task at work has left without a whole reply."""
        replies = self._replies()
        for name, entry in [*self.msg_store.items()]:
            metadata, reply = entry.message.metadata, replies.get(name)
            if metadata.reply_to_message_id or metadata.run_id in at_work:
                continue
            if reply is not None and self._is_whole(reply):
                continue
            if reply is not None:  # its pieces will not come
                self._forget(reply)
            self.object_store.delete(name)
            entry.is_retrieved = True  # else it would be no message of an app that ended
            self._store_error_replies({metadata.run_id}, CLIENT_APP_CRASHED_ERROR)

    def _is_whole(self, reply: str) -> bool:
        try:
            pieces = [*iterate_object_tree(self.object_store.get_object_tree(reply))]
        except NoObjectInStoreError:
            return False
        return all(self.object_store.get(piece.object_id) for piece in pieces)
