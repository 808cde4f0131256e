"""A server on loopback that answers a participant's SuperNode as a test says."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    RegisterNodeFleetResponse,
    UnregisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

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

    address: str
    wrong: dict[str, list[Answer]]
    asked: list[str] = field(default_factory=list)

    def answer(self, what: str) -> Answer:
        self.asked.append(what)
        if self.wrong.get(what):
            return self.wrong[what].pop(0)
        return 200, USUAL[what].SerializeToString()


@contextmanager
def wrong_superlink(wrong: dict[str, list[Answer]]) -> Iterator[WrongSuperLink]:
    """Serve; of each procedure the first answers are those, and then the usual ones."""
    answer: Callable[[str], Answer]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, body = answer(self.path.rpartition("/")[2])
            self.send_response(status)
            self.send_header("Content-Type", "application/protobuf")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        link = WrongSuperLink(f"127.0.0.1:{server.server_port}", wrong)
        answer = link.answer
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield link
        server.shutdown()
