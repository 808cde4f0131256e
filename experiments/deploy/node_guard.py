"""The guard of a participant's SuperNode, which answers every message.

Flower waits without end for the reply of a ClientApp that ended before it gave one. A SuperNode
that waits looks alive, and takes no further message of any run.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Message
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import (
    CLIENT_APP_CRASHED_ERROR,
    InMemoryNodeState,
)

UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def install() -> None:
    """Put this guard before Flower's SuperNode, in this process."""
    vars(nodestate_factory)["InMemoryNodeState"] = AnsweringState


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
