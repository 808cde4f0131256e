"""Is the federation's server the one its certificate names: every answer, and what is wrong."""

import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import ConfigError
from experiments.deploy.reach import ServerError, UnreachableError, check_server, split_address
from tests.support.one_line_server import OneLineServer


def make_certificate(folder: Path, *, days: int = 30, name: str = "127.0.0.1") -> Path:
    """Write a self-signed certificate for an address, and its key; returns the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    san = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))])
    built = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(san, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "server.pem"


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[OneLineServer] = []

    def start(*args: Any, **kwargs: Any) -> str:
        servers.append(OneLineServer(*args, **kwargs))
        return servers[-1].address

    yield start
    for server in servers:
        server.close()


def test_a_server_with_the_right_certificate(serve: Any, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    address = serve(certificate)
    assert check_server(address, certificate, insecure=False) == (
        f"{address} answers, certificate verified, valid for 30 days"
    )


def test_certificates_that_do_not_verify(serve: Any, tmp_path: Path) -> None:
    good = make_certificate(tmp_path / "good")
    with pytest.raises(ServerError, match="was not issued by your CA file"):
        check_server(serve(make_certificate(tmp_path / "other")), good, insecure=False)
    with pytest.raises(ServerError, match="Set certificate to the federation's ca"):
        check_server(serve(good), None, insecure=False)
    old = make_certificate(tmp_path / "old", days=-1)
    with pytest.raises(ServerError, match="certificate has expired"):
        check_server(serve(old), old, insecure=False)
    elsewhere = make_certificate(tmp_path / "elsewhere", name="10.1.2.3")
    with pytest.raises(ServerError, match="is for another name"):
        check_server(serve(elsewhere), elsewhere, insecure=False)
    with pytest.raises(ConfigError, match="It must be the federation's CA certificate"):
        check_server(serve(good), tmp_path / "none", insecure=False)


def test_tls_and_plain_are_not_mixed_up(serve: Any, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with pytest.raises(ServerError, match="no TLS there"):
        check_server(serve(), certificate, insecure=False)
    with pytest.raises(ServerError, match="TLS"):
        check_server(serve(certificate), None, insecure=True)
    assert "WITHOUT TLS" in check_server(serve(), None, insecure=True)


def test_something_else_answers(serve: Any) -> None:
    with pytest.raises(ServerError, match=r"answered with 'HTTP/1\.1 404 Not Found'"):
        check_server(serve(answer="404 Not Found"), None, insecure=True)


def test_nobody_answers() -> None:
    with pytest.raises(UnreachableError, match=r"nobody answers at 127\.0\.0\.1:9"):
        check_server("127.0.0.1:9", None, insecure=True)


@pytest.mark.parametrize("server", ["host", "host:", ":8000", "https://host:8000", "host:99999"])
def test_addresses_that_are_none(server: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        split_address(server)


def test_ipv6_stands_in_brackets() -> None:
    assert split_address("[::1]:8000") == ("::1", 8000)
