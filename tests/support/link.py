"""A SuperLink without processes: Flower's handlers and database, and the guard before them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore import task_identity
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers as fleet
from flwr.superlink.servicer.runtime import runtime_handlers as runtime

from common.inflation import Replies
from common.messages import LARGEST_REPLY
from experiments.deploy.guard import Guard

SERVER = Node(node_id=SUPERLINK_NODE_ID)
GUARDED = (
    (
        fleet,
        (
            "pull_messages",
            "pull_object",
            "push_messages",
            "push_object",
            "confirm_message_received",
        ),
    ),
    (runtime, ("push_messages", "pull_messages")),
)

HANDLERS = {(module, name): getattr(module, name) for module, names in GUARDED for name in names}
"""Flower's own."""


@contextmanager
def guarded_link(folder: Path, nodes: int = 2) -> Iterator[Link]:
    """Open a link whose handlers are guarded until the context is left."""
    identity = dict(vars(task_identity.TaskIdentity))
    try:
        yield Link(folder, nodes)
    finally:
        for (module, name), handler in HANDLERS.items():
            setattr(module, name, handler)
        for name in ("_run_id", "_node_id", "_task_id"):
            setattr(task_identity.TaskIdentity, name, identity[name])


class Link:
    """The database of a SuperLink, some nodes and one run of a server."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.store = folder, ObjectStoreFactory(str(folder / "state.db"))
        factory = LinkStateFactory(str(folder / "state.db"), NoOpFederationManager(), self.store)
        self.state: Any = factory.state()
        self.restart()
        self.nodes = []
        for number in range(nodes):
            node = self.state.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key%d" % number, 60, name=f"n{number}"
            )
            self.state.activate_node(node, 600)
            self.nodes.append(node)
        self.run = self.state.create_run(
            "a", "1", "h", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        self.state.claim_task(task)
        self.state.activate_task(task)
        self.task: Any = SimpleNamespace(run_id=self.run)
        client = SimpleNamespace(
            PullMessages=lambda r: runtime.pull_messages(r, self.state, self.task),
            PullObject=lambda r: runtime.pull_object(r, self.state, self.task),
            ConfirmMessageReceived=lambda r: runtime.confirm_message_received(
                r, self.state, self.task
            ),
        )
        self.waiting: dict[str, int] = {}
        self._replies = Replies(self.waiting.get)
        self._grid = SimpleNamespace(
            _runtime_client=client, _run=SimpleNamespace(run_id=self.run), node=SERVER
        )
        for name, value in (
            ("_run_id", self.run),
            ("_node_id", SUPERLINK_NODE_ID),
            ("_task_id", 1),
        ):
            setattr(task_identity.TaskIdentity, name, value)

    # --- the server ------------------------------------------------------------------------------

    def restart(self) -> None:
        """Start another SuperLink with the same database: its guard knows nothing."""
        for (module, name), handler in HANDLERS.items():
            setattr(module, name, handler)
        self.guard = Guard(fleet, runtime)
        self.guard.install()

    def send(
        self,
        node: int,
        content: RecordDict | None = None,
        *,
        whole: bool = True,
        most_bytes: int = LARGEST_REPLY,
    ) -> str:
        """Send a message of the server's with all its pieces, or without; return its id."""
        content = content or RecordDict()
        content["config"] = ConfigRecord({"nonce": secrets.token_hex(8)})
        message = FlowerMessage(
            content,
            node,
            "train.personal",
            ttl=3600.0,
            group_id=f"1, reply up to {most_bytes} bytes",
        )
        facts = {"_run_id": self.run, "_src_node_id": SUPERLINK_NODE_ID}
        message.metadata.__dict__.update(facts)
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(message)],
            message_object_trees=[get_object_tree(message)],
        )
        response = runtime.push_messages(request, self.state, self.task)
        for name, piece in get_all_nested_objects(message).items() if whole else ():
            pushed = PushObjectRequest(
                node=SERVER, run_id=self.run, object_id=name, object_content=piece.deflate(),
                session_id=response.session_id,
            )  # fmt: skip
            runtime.push_object(pushed, self.state, self.task)
        self.waiting[response.message_ids[0]] = 2**25
        return str(response.message_ids[0])

    def pull(self, *message_ids: str) -> list[Any]:
        """Pull what came to messages; those that are answered are waited for no longer."""
        found = self._replies.pull(self._grid, message_ids)
        for reply in found:
            self.waiting.pop(reply.metadata.reply_to_message_id, None)
        return found

    # --- a node ----------------------------------------------------------------------------------

    def fetch(self, node: int) -> Any:
        """Return the message that a node gets, None where there is none."""
        request = PullMessagesRequest(node=Node(node_id=node))
        found = fleet.pull_messages(
            request=request, state=self.state, store=self.state.object_store
        ).messages_list
        return found[0] if found else None

    def reply(
        self, node: int, message: Any, pieces: list[ObjectTree], *, root: str = "", **claims: Any
    ) -> Any:
        """Hand in a reply of so many pieces; return Flower's response."""
        facts = message.metadata
        fields = {
            "run_id": facts.run_id, "message_id": root or secrets.token_hex(32),
            "src_node_id": node, "dst_node_id": SUPERLINK_NODE_ID, "group_id": facts.group_id,
            "reply_to_message_id": facts.message_id, "created_at": time.time(), "ttl": 60.0,
            "message_type": facts.message_type,
        } | claims  # fmt: skip
        handed = Message(metadata=Metadata(**fields))
        handed.content.SetInParent()
        tree = ObjectTree(object_id=str(fields["message_id"]), children=pieces)
        request = PushMessagesRequest(
            node=Node(node_id=node), messages_list=[handed], message_object_trees=[tree]
        )
        return fleet.push_messages(request, self.state)

    def answer(self, message: Any, content: RecordDict | None = None) -> FlowerMessage:
        """Return an honest reply to a message."""
        answer = FlowerMessage(content or RecordDict(), reply_to=message_from_proto(message))
        answer.metadata.__dict__["_message_id"] = answer.object_id
        return answer

    def ask(self, node: int) -> tuple[str, FlowerMessage]:
        """Send a node a message that it takes; return its id, and a reply with a vector."""
        sent = self.send(node)
        return sent, self.answer(self.fetch(node), vector()[1])

    def announce(self, node: int, answer: FlowerMessage) -> Any:
        """Hand in a reply, without its pieces; return the response."""
        proto = message_to_proto(answer)
        proto.ClearField("content")
        proto.content.SetInParent()
        request = PushMessagesRequest(
            node=Node(node_id=node),
            messages_list=[proto],
            message_object_trees=[get_object_tree(answer)],
        )
        return fleet.push_messages(request, self.state)

    def hand_in(self, node: int, answer: FlowerMessage) -> None:
        """Hand in a reply with all its pieces."""
        response, parts = self.announce(node, answer), get_all_nested_objects(answer)
        for name in response.objects_to_push:
            assert self.push(node, response.session_id, name, parts[name].deflate())

    def push(self, node: int, session: str, name: str, content: bytes) -> bool:
        """Push a piece; return whether it was stored."""
        request = PushObjectRequest(
            node=Node(node_id=node), run_id=self.run, object_id=name, object_content=content,
            session_id=session,
        )  # fmt: skip
        return bool(fleet.push_object(request, self.state).stored)

    def get(self, node: int, name: str) -> bytes | None:
        """Fetch a piece; None where there is none for this node."""
        request = PullObjectRequest(node=Node(node_id=node), run_id=self.run, object_id=name)
        found = fleet.pull_object(request=request, state=self.state)
        return bytes(found.object_content) if found.object_found else None

    def confirm(self, node: int, message_id: str) -> None:
        """Confirm that a message has been received."""
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=self.run, message_object_id=message_id
        )
        fleet.confirm_message_received(request, self.state, self.state.object_store)

    def num_pieces(self) -> int:
        """Count what the database holds."""
        return len(self.state.object_store)


# --- what goes over it ----------------------------------------------------------------------------


def chunks(count: int, size: int = 1000) -> dict[str, bytes]:
    made = [ArrayChunk(secrets.token_bytes(size)).deflate() for _ in range(count)]
    return {get_object_id(content): content for content in made}


def trees(names: Iterable[str]) -> list[ObjectTree]:
    return [ObjectTree(object_id=name) for name in names]


def vector(seed: int = 1) -> tuple[Array, RecordDict]:
    array = Array(np.random.default_rng(seed).standard_normal(500).astype(np.float32))
    return array, RecordDict({"arrays": ArrayRecord({"global-theta": array})})
