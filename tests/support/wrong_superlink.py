"""A server on loopback that answers a participant's SuperNode as a test says."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    RegisterNodeFleetResponse,
    UnregisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

from tests.support.answering import answering
from tests.support.node import NODE

Answer = tuple[int, bytes]
USUAL = {
    "register-node": RegisterNodeFleetResponse(node_id=NODE),
    "activate-node": ActivateNodeResponse(node_id=NODE),
    "send-node-heartbeat": SendNodeHeartbeatResponse(success=True),
    "pull-messages": PullMessagesResponse(),
    "deactivate-node": DeactivateNodeResponse(),
    "unregister-node": UnregisterNodeFleetResponse(),
}
"""The answers of a server that has no message, by the procedure."""


@dataclass
class WrongSuperLink:
    """What a server was asked, and how it answers the first who ask."""

    wrong: dict[str, list[Answer]]
    address: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, what: str) -> Answer:
        self.asked.append(what)
        if self.wrong.get(what):
            return self.wrong[what].pop(0)
        return 200, USUAL[what].SerializeToString()


@contextmanager
def wrong_superlink(wrong: dict[str, list[Answer]]) -> Iterator[WrongSuperLink]:
    """Serve; of each procedure the first answers are those, and then the usual ones."""
    link = WrongSuperLink(wrong)

    def answer(path: str, _: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        status, body = link.answer(path.rpartition("/")[2])
        kind = {"Content-Type": "application/protobuf", "Content-Length": str(len(body))}
        return status, kind, body

    with answering(answer) as link.address:
        yield link
