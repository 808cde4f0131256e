"""Can the federation's server be reached, is it the one the certificate names, does it answer."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

from common.errors import ConfigError, MHpFedHNError

TIMEOUT_S = 10.0


class UnreachableError(MHpFedHNError):
    """Nobody answers there now; a SuperNode would wait."""


class ServerError(MHpFedHNError):
    """Somebody answers, and waiting would not help."""


def check_server(server: str, certificate: Path | None, insecure: bool) -> str:
    """Connect, verify the certificate against the server's name, ask for its health.

    Returns what was found, in words. Raises ConfigError where the address or the certificate file
    cannot be used, UnreachableError where nobody accepts connections, and ServerError where the
    certificate does not verify or the other side is no SuperLink.
    """
    host, port = split_address(server)
    context = None if insecure else _context(certificate)
    try:
        connection = socket.create_connection((host, port), timeout=TIMEOUT_S)
    except socket.gaierror as error:
        raise UnreachableError(f"{host!r} is not a known name here: {error.strerror}.") from error
    except OSError as error:
        raise UnreachableError(
            f"nobody answers at {host}:{port} ({error}). Is the SuperLink running, and does your "
            "firewall let this machine out to that port?"
        ) from error
    with connection:
        if context is None:
            return f"{server} {_health(connection, host)}, WITHOUT TLS: anybody on the way can read"
        with _encrypted(connection, context, host, own_ca=bool(certificate)) as encrypted:
            return f"{server} {_health(encrypted, host)}, certificate {_expiry(encrypted)}"


def split_address(server: str) -> tuple[str, int]:
    """Split host:port; an IPv6 host stands in brackets."""
    host, separator, port = server.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(
            f"server = {server!r} must be HOST:PORT, for instance fl.example.org:8000."
        )
    return host.strip("[]"), int(port)


def _context(certificate: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(certificate) if certificate else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"certificate {certificate} cannot be used ({error}). It must be the federation's CA "
            "certificate in PEM format; ask its operator for ca.crt."
        ) from error


def _encrypted(
    connection: socket.socket, context: ssl.SSLContext, host: str, *, own_ca: bool
) -> ssl.SSLSocket:
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise ServerError(_certificate_help(error, host, own_ca)) from error
    except (ssl.SSLError, OSError) as error:
        raise ServerError(
            f"no TLS there ({error}). If this federation really runs without (tests only), say "
            "--insecure; else ask the operator for the right address."
        ) from error


def _certificate_help(error: ssl.SSLCertVerificationError, host: str, own_ca: bool) -> str:
    why = error.verify_message
    if "mismatch" in why or "not valid for" in why:
        return (
            f"the server's certificate is for another name ({why}). Use the name it was made for."
        )
    if "expired" in why:
        return f"the server's certificate has expired ({why}). Its operator must renew it."
    if not own_ca:
        return (
            f"no CA that this machine knows issued the certificate of {host} ({why}). Set "
            "certificate to the federation's ca.crt; its operator has it."
        )
    return (
        f"the certificate of {host} was not issued by your CA file ({why}). Get the federation's "
        "current ca.crt from its operator. Do not go on without: this may be another server."
    )


def _health(connection: socket.socket, host: str) -> str:
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        connection.sendall(request.encode())
        first = connection.recv(1024).split(b"\r\n")[0].decode(errors="replace")
    except OSError as error:
        raise ServerError(
            f"the server hangs up on a plain request ({error}). If it uses TLS, remove --insecure."
        ) from error
    if not first.startswith("HTTP/1.1 200"):
        raise ServerError(
            f"GET /health is answered with {first!r}; a SuperLink says 'HTTP/1.1 200 OK'. Is this "
            "the address of the federation? A server with TLS needs no --insecure."
        )
    return "answers"


def _expiry(connection: ssl.SSLSocket) -> str:
    facts = connection.getpeercert() or {}
    days = (ssl.cert_time_to_seconds(str(facts["notAfter"])) - time.time()) / 86400
    return f"verified, valid for {days:.0f} days"
