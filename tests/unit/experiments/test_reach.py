"""Is the federation's server the one its certificate names: every answer, and what is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from experiments.deploy import certificates
from experiments.deploy.reach import ServerError, UnreachableError, check_server, split_address
from tests.support.one_line_server import OneLineServer


def make(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Make a federation's keys; returns the server's certificate and the CA's."""
    certificates.make_certs(folder, hosts=[host], sites=[])
    return folder / "server" / "server.crt", folder / "ca" / "ca.crt"


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
    certificate, ca = make(tmp_path)
    address = serve(certificate)
    days = certificates.SERVER_DAYS
    assert check_server(address, ca, insecure=False) == (
        f"{address} answers, certificate verified, valid for {days} days"
    )


def test_certificates_that_do_not_verify(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, ca = make(tmp_path / "good")
    with pytest.raises(ServerError, match="was not issued by your CA file"):
        check_server(serve(make(tmp_path / "other")[0]), ca, insecure=False)
    with pytest.raises(ServerError, match="Set certificate to the federation's ca"):
        check_server(serve(good), None, insecure=False)
    elsewhere, its_ca = make(tmp_path / "elsewhere", "10.1.2.3")
    with pytest.raises(ServerError, match="is for another name"):
        check_server(serve(elsewhere), its_ca, insecure=False)
    with pytest.raises(ConfigError, match="It must be the federation's CA certificate"):
        check_server(serve(good), tmp_path / "none", insecure=False)
    monkeypatch.setattr(certificates, "SERVER_DAYS", 0)  # it ends as it is made
    old, its_ca = make(tmp_path / "old")
    with pytest.raises(ServerError, match="certificate has expired"):
        check_server(serve(old), its_ca, insecure=False)


def test_tls_and_plain_are_not_mixed_up(serve: Any, tmp_path: Path) -> None:
    certificate, ca = make(tmp_path)
    with pytest.raises(ServerError, match="no TLS there"):
        check_server(serve(), ca, insecure=False)
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
