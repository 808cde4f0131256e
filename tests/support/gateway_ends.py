"""Both ends of the gateway: a server in place of the SuperLink, and connections of strangers."""

import re
import socket
import ssl
import threading
from contextlib import suppress

from tests.support.deployment import Deployment


class Behind:
    """Takes what the gateway passes on, and answers 200 to every request.

    Asked who is known, it says that everybody with a key is. An answer has `size` bytes.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.received, self.size, self.answered = bytearray(), 0, 0
        server = deployment.certs / "server"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server / "server.crt", server / "server.key")
        self._listener = socket.create_server(("127.0.0.1", deployment.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError), self._context.wrap_socket(plain, server_side=True) as stream:
            while data := stream.recv(65536):
                if data.startswith(b"GET /known "):
                    code = b"204" if b"\r\nFlwr-Public-Key: " in data else b"401"
                    stream.sendall(b"HTTP/1.1 %b OK\r\nContent-Length: 0\r\n\r\n" % code)
                    continue
                self.received += data
                stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.size)
                stream.sendall(b"x" * self.size)
                self.answered += self.size > 0

    def lines(self) -> list[str]:
        """Return every line that begins a request, wherever it stands in what came."""
        found = re.findall(rb"[^\r\n]* HTTP/[^\r\n]*", bytes(self.received))
        self.received.clear()
        return [line.decode(errors="replace") for line in found]

    def close(self) -> None:
        self._listener.close()


Place = tuple[Deployment, int, Behind]
"""The federation, the gateway's port, and who listens behind it."""


def connect(deployment: Deployment, port: int, *, source: str = "127.0.0.1") -> ssl.SSLSocket:
    trusted = ssl.create_default_context(cafile=str(deployment.certs / "site-a" / "ca.crt"))
    trusted.set_alpn_protocols(["h2", "http/1.1"])
    plain = socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))
    return trusted.wrap_socket(plain, server_hostname="127.0.0.1")


def say(place: Place, sent: str) -> tuple[list[int], list[str]]:
    """Send bytes as they stand; return the statuses that came, and the requests that passed."""
    deployment, port, behind = place
    behind.lines()
    came = b""
    with connect(deployment, port) as stream, suppress(OSError):
        stream.settimeout(1.0)
        stream.sendall(sent.encode("latin-1"))
        while data := stream.recv(65536):
            came += data
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", came)], behind.lines()
