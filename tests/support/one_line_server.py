"""A server on loopback that says one line, for those who ask whether it is theirs."""

import socket
import ssl
import threading
from pathlib import Path


class OneLineServer:
    """Answers every connection with one HTTP line; with TLS when it has a certificate."""

    def __init__(self, certificate: Path | None = None, answer: str = "200 OK") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._context = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        self._answer = f"HTTP/1.1 {answer}\r\n\r\n".encode()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._talk(connection)
                except OSError:
                    continue

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        if self._context is not None:
            with self._context.wrap_socket(connection, server_side=True) as encrypted:
                encrypted.recv(1000)
                encrypted.sendall(self._answer)
        else:
            connection.recv(1000)
            connection.sendall(self._answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10.0)
