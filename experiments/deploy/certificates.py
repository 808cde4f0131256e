"""`mh-pfedhn certs`: every secret of a deployment in one command.

    DIR/ca/         ca.crt, ca.key          keep ca.key offline; it signs server certificates
    DIR/server/     ca.crt, server.crt, server.key, superexec.secret, supernodes/SITE.pub
    DIR/SITE/       ca.crt, supernode, supernode.pub, superexec.secret

Each participant gets the folder with its name and nothing else. What exists is kept, so that the
command can be repeated to add a site.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, listing
from common.files import replace_file

PRIVATE, PUBLIC = 0o600, 0o644
CA_DAYS, SERVER_DAYS = 3650, 825
RESERVED = ("ca", "server")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def add_certs_parser(commands: Any) -> None:
    """Add `certs` to the command line."""
    command = commands.add_parser("certs", help="make the keys and certificates of a deployment")
    command.add_argument("folder", metavar="DIR", help="where they go")
    command.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME|IP",
        help="a name or address under which participants reach the server; repeat for more",
    )
    command.add_argument(
        "--site", action="append", default=[], metavar="NAME", help="a participant; repeat for more"
    )
    command.add_argument("--force", action="store_true", help="replace what is there")
    command.set_defaults(command=run_certs)


def run_certs(args: argparse.Namespace) -> int:
    """Make what is missing, say what was made and who gets it; return 0."""
    folder = Path(args.folder).expanduser()
    hosts = args.host or ["localhost", "127.0.0.1"]
    made = make_certs(folder, hosts=hosts, sites=args.site, force=args.force)
    for path in made:
        print(f"made  {path}")
    if not made:
        print(f"all is there already in {folder}; --force makes it anew")
    print(f"\nThe server gets {folder / 'server'}. Reached as {listing(hosts)}.")
    for site in args.site:
        print(f"Participant {site} gets {folder / site} and registers as:")
        public = folder / "server" / "supernodes" / f"{site}.pub"
        print(f"    flwr supernode register {public} --name {site}")
    print(f"Keep {folder / 'ca' / 'ca.key'} offline: whoever has it can pose as the server.")
    return 0


def make_certs(
    folder: Path, *, hosts: Sequence[str], sites: Sequence[str], force: bool = False
) -> list[Path]:
    """Make a CA, a server certificate for `hosts`, and a key pair and secret for each site.

    Parameters
    ----------
    force
        Replace what is there: everybody has to get new files. Else it is kept.

    Returns
    -------
    The files that were written, private ones with mode 0600.

    Raises
    ------
    ConfigError
        A name cannot be used, or the server certificate that is there is for other hosts.
    """
    for site in sites:
        if not _SITE.fullmatch(site) or site in RESERVED:
            raise ConfigError(
                f"site {site!r}: use up to 63 letters, digits, '.', '_' and '-', starting with a "
                f"letter or digit, and none of {listing(RESERVED)}."
            )
    writer = _Writer(force)
    ca = _authority(folder / "ca", writer)
    _server(folder / "server", hosts, ca, writer)
    for site in sites:
        _site(folder, site, ca, writer)
    return writer.made


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


class _Writer:
    """Writes files that are missing, or all of them; never a private one readable by others."""

    def __init__(self, force: bool) -> None:
        self.force = force
        self.made: list[Path] = []

    def wants(self, path: Path) -> bool:
        return self.force or not path.exists()

    def write(self, path: Path, mode: int, content: Callable[[], bytes]) -> None:
        if not self.wants(path):
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, content(), mode=mode)
        self.made.append(path)


def _authority(folder: Path, writer: _Writer) -> _Authority:
    """Load the CA, or make one."""
    key_path, certificate_path = folder / "ca.key", folder / "ca.crt"
    if not writer.wants(key_path) and not writer.wants(certificate_path):
        return _Authority(_load_certificate(certificate_path), _load_key(key_path))
    if not writer.force and (key_path.exists() or certificate_path.exists()):
        raise ConfigError(
            f"{folder} has only one of ca.crt and ca.key. Put the other back, or make all anew "
            "with --force (every participant then needs its new ca.crt)."
        )
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MH-pFedHN federation CA")])
    builder = _certificate(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    authority = _Authority(builder.sign(key, hashes.SHA384()), key)
    writer.write(key_path, PRIVATE, lambda: _pem(key))
    writer.write(certificate_path, PUBLIC, lambda: authority.pem)
    return authority


def _server(folder: Path, hosts: Sequence[str], ca: _Authority, writer: _Writer) -> None:
    certificate_path = folder / "server.crt"
    if not writer.wants(certificate_path):
        _require_hosts(certificate_path, hosts)
    key = ec.generate_private_key(ec.SECP384R1())
    if writer.wants(certificate_path) or writer.wants(folder / "server.key"):
        (folder / "server.key").unlink(missing_ok=True)
        certificate_path.unlink(missing_ok=True)
    writer.write(folder / "ca.crt", PUBLIC, lambda: ca.pem)
    writer.write(folder / "server.key", PRIVATE, lambda: _pem(key))
    writer.write(certificate_path, PUBLIC, lambda: _server_certificate(key, hosts, ca))
    writer.write(folder / "superexec.secret", PRIVATE, lambda: secrets.token_bytes(32))


def _site(folder: Path, site: str, ca: _Authority, writer: _Writer) -> None:
    own = folder / site
    private = own / "supernode"
    key = ec.generate_private_key(ec.SECP384R1()) if writer.wants(private) else _load_ssh(private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    line = public + f" {site}\n".encode()
    writer.write(own / "ca.crt", PUBLIC, lambda: ca.pem)
    writer.write(private, PRIVATE, lambda: _pem(key, serialization.PrivateFormat.OpenSSH))
    writer.write(own / "supernode.pub", PUBLIC, lambda: line)
    writer.write(own / "superexec.secret", PRIVATE, lambda: secrets.token_bytes(32))
    writer.write(folder / "server" / "supernodes" / f"{site}.pub", PUBLIC, lambda: line)


def _server_certificate(
    key: ec.EllipticCurvePrivateKey, hosts: Sequence[str], ca: _Authority
) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MH-pFedHN server")])
    builder = _certificate(name, ca.certificate.subject, key.public_key(), SERVER_DAYS)
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    server_auth = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(server_auth, critical=False)
    builder = builder.add_extension(authority_key, critical=False)
    return builder.sign(ca.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(hours=1),  # clocks differ
        not_valid_after=now + timedelta(days=days),
        extensions=[
            x509.Extension(
                x509.SubjectKeyIdentifier.oid, False, x509.SubjectKeyIdentifier.from_public_key(key)
            )
        ],
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _require_hosts(path: Path, hosts: Sequence[str]) -> None:
    names = _load_certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    found = {str(name.value) for name in names.value}
    if not set(hosts) <= found:
        raise ConfigError(
            f"{path} is for {listing(sorted(found))}; asked for {listing(hosts)}. Delete it to get "
            "a new one from the same CA (participants keep their files), or use --force."
        )


def _pem(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no readable certificate: {error}") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    return _elliptic(path, serialization.load_pem_private_key)


def _load_ssh(path: Path) -> ec.EllipticCurvePrivateKey:
    return _elliptic(path, serialization.load_ssh_private_key)


def _elliptic(path: Path, load: Callable[[bytes, None], object]) -> ec.EllipticCurvePrivateKey:
    try:
        key = load(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic curve key, which Flower needs.")
    return key
