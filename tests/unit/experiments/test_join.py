"""`mh-pfedhn join`: settings, and every check with what is wrong and what to change."""

import argparse
import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from flwr.common.config import parse_config_args
from rich.console import Console

from common.config import NodeConfig
from common.errors import ConfigError, RunError
from experiments import join, join_checks
from experiments.examples import my_site
from experiments.join import JoinSettings, add_join_parser, read_settings
from experiments.lean_clientapp import install_lean_clientapp
from experiments.reach import ServerError, UnreachableError, check_server, split_address
from experiments.supervise import explain
from tests.support import tiny

BASIC = {"client-id": "site-a", "server": "127.0.0.1:9", "insecure": True, "dataset": "digits"}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_join_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["join", *words])


def settings(folder: Path, **changes: Any) -> JoinSettings:
    values = BASIC | {"state-dir": str(folder / "state")}
    return JoinSettings.parse(values | changes, folder)


# --- settings ------------------------------------------------------------------------------------


def test_paths_in_the_file_are_relative_to_it_and_a_flag_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site" / "join.toml"
    file.parent.mkdir()
    example = Path(my_site.__file__).with_suffix(".toml").read_text()
    file.write_text(example)
    monkeypatch.chdir(tmp_path)
    found = read_settings(
        arguments(str(file), "--key", "other.key", "--set", "image-size=16", "device=cpu")
    )
    assert found.server == "federation.example.org:8000"
    assert found.certificate == file.parent / "ca.crt"
    assert found.key == tmp_path / "other.key"
    assert found.base == file.parent
    assert found.folder == file.parent / "state" / "hospital-a"
    node = NodeConfig.parse(found.node)
    assert (node.image_size, node.device, node.partition) == (16, "cpu", "none")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"modle": "cnn"}, r"join: unknown key 'modle'\. Did you mean 'model'\?"),
        ({"client-id": ""}, r"join: client-id is missing, for instance --client-id hospital-a"),
        ({"server": ""}, r"join: server is missing"),
        ({"key": "k"}, r"insecure means no TLS: remove it, or both certificate and key"),
        ({"image-size": 2}, r"node config: image-size = 2 cannot be used"),
        ({"client-id": "../x"}, r"cannot name a folder"),
    ],
)
def test_bad_settings_say_what_to_change(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _ = settings(tmp_path, **changes).folder


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        read_settings(arguments(str(tmp_path / "none.toml")))
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(ConfigError, match=r"bad\.toml is no valid TOML"):
        read_settings(arguments(str(tmp_path / "bad.toml")))


def test_flower_reads_back_the_node_config(tmp_path: Path) -> None:
    odd = 'a "b" \\ c = d / é'
    found = settings(tmp_path, **{"data-dir": str(tmp_path / odd), "test-fraction": 0.5})
    found.folder.mkdir(parents=True)
    command = found.command(port=9999)
    read = parse_config_args([command[command.index("--node-config") + 1]])
    assert read == dict(found.node)
    assert "--insecure" in command
    assert "--root-certificates" not in command


def test_the_environment_is_the_participants_own(tmp_path: Path) -> None:
    own = settings(tmp_path, dataset="my_site:load_scans")
    env = own.environment()
    assert env["FLWR_HOME"] == str(own.folder / "flwr")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path)
    assert env["PATH"].split(os.pathsep)[0] == str(own.folder / "bin")
    assert settings(tmp_path).environment().get("PYTHONPATH") == os.environ.get("PYTHONPATH")


def test_two_joins_in_one_folder_are_refused(tmp_path: Path) -> None:
    text = rf"another `mh-pfedhn join` \(process {os.getpid()}\) already runs"
    with join._only_one(tmp_path), pytest.raises(RunError, match=text), join._only_one(tmp_path):
        pass
    with join._only_one(tmp_path):
        pass


def test_the_lean_program_is_flowers_own(tmp_path: Path) -> None:
    program = install_lean_clientapp(tmp_path / "a b") / "flwr-clientapp"
    code = (
        "import sys; sys.argv = ['flwr-clientapp', '--help']\n"
        "import experiments.lean_clientapp as lean\n"
        "try: lean.main()\n"
        "except SystemExit: print('sqlalchemy' in sys.modules, 'alembic' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--runtime-api-address" in found.stdout
    assert found.stdout.strip().endswith("False False")
    assert program.stat().st_mode & 0o111
    assert str(Path(sys.executable)) in program.read_text()


# --- keys ----------------------------------------------------------------------------------------


def private_bytes(key: Any) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(private_bytes(ec.generate_private_key(ec.SECP384R1())))
    path.chmod(0o600)
    assert join_checks.check_key(path).detail == f"{path}, secp384r1"
    assert join_checks.check_key(path).warning == ""
    path.chmod(0o644)
    assert f"others can read it (mode 644): chmod 600 {path}" in join_checks.check_key(path).warning
    path.write_bytes(private_bytes(ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(ConfigError, match=r"Ed25519PrivateKey; Flower needs ECDSA\. Make one: ssh"):
        join_checks.check_key(path)
    path.write_bytes(b"ecdsa-sha2-nistp384 AAAA")
    with pytest.raises(ConfigError, match="is the public key; give the private one"):
        join_checks.check_key(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no private key in OpenSSH format without passphrase"):
        join_checks.check_key(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        join_checks.check_key(tmp_path / "none")


# --- the server ----------------------------------------------------------------------------------


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


class Server:
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


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(*args: Any, **kwargs: Any) -> str:
        servers.append(Server(*args, **kwargs))
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


# --- the whole list ------------------------------------------------------------------------------


def checked(found: JoinSettings, *, must_answer: bool = False) -> tuple[bool, str]:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    found.folder.mkdir(parents=True, exist_ok=True)
    good = join_checks.run_checks(found, console, must_answer=must_answer)
    console.file.close()
    return good, console.export_text()


def own(folder: Path, **changes: Any) -> JoinSettings:
    values = {"model": f"{tiny.HERE}:normed", "dataset": f"{tiny.HERE}:patterns", "image-size": 8}
    return settings(folder, **(values | {"cache-dir": str(folder / "cache")} | changes))


def test_a_good_participant_passes(tmp_path: Path, serve: Any) -> None:
    good, text = checked(own(tmp_path, server=serve()), must_answer=True)
    assert good, text
    assert "360 to train and 120 to test, 4 classes (" in text, text
    assert ":normed, 116 parameters" in text
    assert "an epoch of 6 batches" in text
    assert text.count("✗") == 0


def test_a_server_that_is_away_fails_only_a_mere_check(tmp_path: Path) -> None:
    assert checked(own(tmp_path))[0] is True
    good, text = checked(own(tmp_path), must_answer=True)
    assert good is False
    assert "✗ server" in text


def test_each_failure_is_shown_and_what_depends_on_it_named(tmp_path: Path) -> None:
    good, text = checked(own(tmp_path, model="cn"))
    assert good is False
    assert "✗ model        unknown model 'cn'. Did you mean 'cnn'?" in text
    assert "✗ training     not checked: needs the model, see above." in text
    good, text = checked(own(tmp_path, model=f"{tiny.HERE}:explodes"))
    assert "✗ training     RuntimeError: this model cannot run" in text
    good, text = checked(own(tmp_path, dataset="folder", **{"data-dir": str(tmp_path / "no")}))
    assert good is False
    assert "is not a folder. Give the absolute path" in text


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        (["\x1b[91mERROR\x1b[0m: Exit Code: 305"], 305, "the server refused the connection"),
        (["Exit Code: 302", "Unable to parse"], 302, "the key cannot be used (exit code 302)"),
        (["Exit Code: 606"], 606, "install the same on both sides"),
        (["Exit Code: 777"], 777, "exit code 777"),
        (["first", "Killed", ""], 0, "Killed"),
        ([], 0, "no output"),
    ],
)
def test_why_a_supernode_ended(lines: list[str], code: int, text: str) -> None:
    found = explain(lines)
    assert found[0] == code
    assert text in found[1]
