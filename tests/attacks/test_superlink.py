"""What a node may hand in at a SuperLink: one reply, in its own name, with finite numbers."""

import base64
import http.client
import math
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from common.errors import WireError
from experiments.deploy.guard import require_reply
from experiments.deploy.inbox import DEEPEST, MOST_PIECES, claimed_parts
from tests.support.deployment import Deployment

ME = 77


def handed_in(node: int = ME, **claims: Any) -> PushMessagesRequest:
    fields = {
        "run_id": 1, "message_id": "a" * 64, "src_node_id": node, "created_at": 1.0, "ttl": 60.0,
        "dst_node_id": SUPERLINK_NODE_ID, "reply_to_message_id": "b" * 64, "group_id": "1",
        "message_type": "train.personal",
    }  # fmt: skip
    message = Message(metadata=Metadata(**(fields | claims)))
    message.content.SetInParent()
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[message],
        message_object_trees=[ObjectTree(object_id="a" * 64)],
    )


BAD: dict[str, dict[str, Any]] = {
    "as the SuperLink": {"src_node_id": SUPERLINK_NODE_ID, "reply_to_message_id": ""},
    "as another node": {"src_node_id": 78},
    "to another node": {"dst_node_id": 78},
    "an answer to nothing": {"reply_to_message_id": ""},
    "a time that is none": {"created_at": math.nan},
    "a time without end": {"ttl": math.inf},
    "a time before all": {"ttl": -1.0},
    "pieces of another": {"message_id": "c" * 64},
}


def test_an_honest_reply_passes() -> None:
    require_reply(handed_in())


@pytest.mark.parametrize("how", BAD)
def test_nothing_else_passes(how: str) -> None:
    with pytest.raises(WireError):
        require_reply(handed_in(**BAD[how]))


def test_one_message_at_a_time() -> None:
    twice = handed_in()
    twice.messages_list.append(twice.messages_list[0])
    odd = handed_in()
    odd.clientapp_runtime_list.append(math.nan)
    for request in (twice, odd, PushMessagesRequest(node=Node(node_id=ME))):
        with pytest.raises(WireError):
            require_reply(request)


def test_a_reply_has_so_many_pieces_and_they_lie_so_deep() -> None:
    many, deep = ObjectTree(object_id="a" * 64), ObjectTree(object_id="a" * 64)
    for number in range(MOST_PIECES - 1):
        many.children.add(object_id=f"{number:064x}")
    piece = deep
    for depth in range(DEEPEST - 1):
        piece = piece.children.add(object_id=f"{depth:064x}")
    assert len(claimed_parts(many)) == MOST_PIECES
    assert len(claimed_parts(deep)) == DEEPEST
    many.children.add(object_id="d" * 64)
    piece.children.add(object_id="e" * 64)
    for tree in (many, deep):
        with pytest.raises(WireError, match="160 pieces, 8 deep"):
            claimed_parts(tree)


class RawNode:
    """A participant with a registered key that sends what it likes."""

    def __init__(self, deployment: Deployment, site: str) -> None:
        self._port = deployment.port
        self._trusted = ssl.create_default_context(cafile=str(deployment.certs / site / "ca.crt"))
        key = load_ssh_private_key((deployment.certs / site / "supernode").read_bytes(), None)
        self._key: Any = key
        self._public = public_key_to_bytes(self._key.public_key())
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=60)
        status, body = self.call("activate-node", request)
        assert status == 200, body
        self.node_id = ActivateNodeResponse.FromString(body).node_id

    def call(self, procedure: str, request: Any) -> tuple[int, bytes]:
        stamp = now().isoformat()
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, timeout=20, context=self._trusted
        )
        headers = {
            "Content-Type": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self._public).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(
                sign_message(self._key, stamp.encode("ascii"))
            ).decode(),
            TIMESTAMP_HEADER: stamp,
        }
        body = request.SerializeToString()
        connection.request("POST", f"/v1/fleet/{procedure}", body=body, headers=headers)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found


def test_a_running_superlink_refuses_them(tmp_path: Path) -> None:
    """Before it looks at the run, and before anything of them is in its database."""
    with Deployment(tmp_path, ["site-a"]) as deployment:
        deployment.start_superlink()
        deployment.register("site-a")
        node = RawNode(deployment, "site-a")
        for how, claims in BAD.items():
            status, _ = node.call("push-messages", handed_in(**{"node": node.node_id, **claims}))
            assert status == 403, how
        log = deployment.log("superlink")
        assert "created_at and ttl must be finite numbers" in log
        assert f"hands in a message from {SUPERLINK_NODE_ID} to {SUPERLINK_NODE_ID}" in log
