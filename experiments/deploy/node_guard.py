"""The guard of a participant's SuperNode: its messages are answered, by the app that came.

Flower waits without end for the reply of a ClientApp that ended before it gave one; a SuperNode
that waits looks alive, and takes no further message of any run. And it loads an app, whose content
it has verified, from the folder of a name and version that the server states.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flwr.app import Message
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as worker
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import (
    CLIENT_APP_CRASHED_ERROR,
    InMemoryNodeState,
)

from common.files import printable
from common.log import logger
from experiments.deploy.superlink import on_a_line

_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}")
"""Of a folder's name: it leads nowhere."""
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


class OtherAppError(Exception):
    """What a server states of an app is not what the app says of itself."""


def require_same_app(run: Run, content: bytes) -> None:
    """Raise OtherAppError unless a run is of this app, by name, version and content."""
    name, version = get_fab_metadata(content)
    stated = (run.fab_id, run.fab_version, run.fab_hash)
    if stated != (name, version, hashlib.sha256(content).hexdigest()):
        raise OtherAppError(f"the server states another app, {stated}, than {name} {version}")
    parts = (*name.split("/"), version)
    if len(parts) != 3 or not all(map(_PART.fullmatch, parts)):
        raise OtherAppError(f"{name!r}, {version!r} cannot name a folder")


def pull(flower: Callable[..., int | None], **known: Any) -> int | None:
    """Take a message as Flower does, and answer one of another app than the server states."""
    got: list[Message] = []

    def receive() -> Any:
        if (found := known["receive"]()) is not None:
            got.append(found[0])
        return found

    try:
        return flower(**known | {"receive": receive})
    except OtherAppError as error:
        logger.error("an app is refused: %s", printable(str(error))[:1000])
        reply = Message(worker.FAB_VERIFICATION_ERROR, reply_to=got[0])
        worker._insert_message(reply, known["state"], known["object_store"])
        return got[0].metadata.run_id


def _config(flower: Callable[..., Any], content: bytes, run: Run) -> Any:
    require_same_app(run, content)  # Flower has verified it, and stores what the server states
    return flower(content, run)


class AnsweringState(InMemoryNodeState):
    """What a SuperNode knows; every message in it is answered once no task is at work on it."""

    def get_messages_legacy(
        self,
        *,
        run_ids: Sequence[int] | None = None,
        is_reply: bool | None = None,
        limit: int | None = None,
    ) -> Sequence[Message]:
        """Return messages; of replies those that are whole.

        A task may end before it takes its message, while it reads it, or in the midst of its reply.
        """
        if is_reply:
            at_work = {task.run_id for task in self.get_tasks(statuses=UNFINISHED)}
            with self.lock_msg_store:
                self._answer_for_ended(at_work)
                if not all(map(self._is_whole, self._replies().values())):
                    return []  # its task is at work, or else it would be an error by now
        return super().get_messages_legacy(run_ids=run_ids, is_reply=is_reply, limit=limit)

    def _replies(self) -> dict[str, str]:
        """Return the ids of the replies by that of the message that each answers."""
        found = [entry.message.metadata for entry in self.msg_store.values()]
        return {x.reply_to_message_id: x.message_id for x in found if x.reply_to_message_id}

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
                self.delete_messages(message_ids=[reply])
                self.object_store.delete(reply)
            entry.is_retrieved = True  # else it would be no message of an app that ended
            self._store_error_replies({metadata.run_id}, CLIENT_APP_CRASHED_ERROR)

    def _is_whole(self, reply: str) -> bool:
        try:
            pieces = [*iterate_object_tree(self.object_store.get_object_tree(reply))]
        except NoObjectInStoreError:
            return False
        return all(self.object_store.get(piece.object_id) for piece in pieces)
