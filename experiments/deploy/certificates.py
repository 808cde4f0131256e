"""`mh-pfedhn certs`: every secret of a deployment in one command.

    DIR/ca/         ca.crt, ca.key          keep ca.key offline; it signs server certificates
    DIR/server/     ca.crt, server.crt, server.key, superexec.secret, flwr.toml, supernodes/SITE.pub
    DIR/SITE/       ca.crt, supernode, supernode.pub, superexec.secret, federation.toml

Each participant gets the folder with its name and nothing else. What exists is kept, so that the
command can be repeated to add a site.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, listing
from common.files import replace_file
from experiments.deploy.contract import CONTRACT, Contract

PRIVATE, PUBLIC = 0o600, 0o644
CA_DAYS, SERVER_DAYS = 3650, 825
RESERVED = ("ca", "server")
FLWR = """# The operator's ~/.flwr/config.toml, for a SuperLink on this machine.
[superlink]
default = "federation"

[superlink.federation]
address = "127.0.0.1:8000"
root-certificates = "{certificate}"
"""
USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def add_certs_parser(commands: Any) -> None:
    """Add `certs` to the command line."""
    command = commands.add_parser("certs")
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
    command.add_argument(
        "--contract", type=Path, metavar="FILE", help="goes to every participant (contract new)"
    )
    command.add_argument("--force", action="store_true", help="replace what is there")
    command.set_defaults(command=run_certs)


def run_certs(args: argparse.Namespace) -> int:
    """Make what is missing, say what was made and who gets it; return 0."""
    folder = Path(args.folder).expanduser()
    hosts = args.host or ["localhost", "127.0.0.1"]
    made = make_certs(folder, hosts=hosts, sites=args.site, force=args.force)
    if args.contract:
        if not (contract := Contract.read(args.contract)).server:
            raise ConfigError(f"{args.contract}: server is empty; sites could not find it.")
        if contract.server.rpartition(":")[0] not in hosts:
            print(f"note: the contract's server {contract.server} is none of {listing(hosts)}")
        for site in args.site:
            replace_file(folder / site / CONTRACT, args.contract.read_text())
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

    What is there is kept, unless `force` replaces it: everybody then has to get new files. Returns
    the files that were written, private ones with mode 0600. Raises ConfigError where a name cannot
    be used, or the server certificate that is there is for other hosts.
    """
    for site in sites:
        if not _SITE.fullmatch(site) or site in RESERVED:
            raise ConfigError(
                f"site {site!r}: use up to 63 letters, digits, '.', '_' and '-', starting with a "
                f"letter or digit, and none of {listing(RESERVED)}."
            )
    maker = _Maker(folder, force)
    maker.make_server(hosts)
    for site in sites:
        maker.make_site(site)
    return maker.made


class _Maker:
    """Loads or makes the CA, then makes the files that are missing, or with `force` all anew."""

    def __init__(self, folder: Path, force: bool) -> None:
        self._folder, self._force = folder, force
        self.made: list[Path] = []
        key_path, path = folder / "ca" / "ca.key", folder / "ca" / "ca.crt"
        if not force and key_path.exists() != path.exists():
            raise ConfigError(
                f"{path.parent} has only one of ca.crt and ca.key. Put the other back, or make all "
                "anew with --force (every participant then needs its new ca.crt)."
            )
        pem = self._keep(key_path, PRIVATE, lambda: _pem(_new_key()))
        self._key = _load_key(key_path, pem, serialization.load_pem_private_key)
        self._pem = self._keep(
            path, PUBLIC, lambda: _certificate("MH-pFedHN federation CA", self._key)
        )
        self._name = _load_certificate(path, self._pem).subject

    def _keep(self, path: Path, mode: int, make: Callable[[], bytes]) -> bytes:
        """Return the content of a file, which is made unless it is there to stay."""
        if path.exists() and not self._force:
            return path.read_bytes()
        content = make()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, content, mode=mode)
        self.made.append(path)
        return content

    def make_server(self, hosts: Sequence[str]) -> None:
        """Make the server's folder, its certificate for `hosts`."""
        folder = self._folder / "server"
        key_path, path = folder / "server.key", folder / "server.crt"
        if path.exists() and not self._force:
            _require_hosts(path, hosts)
        if not (path.exists() and key_path.exists()):  # they belong together
            path.unlink(missing_ok=True)
            key_path.unlink(missing_ok=True)
        key, ca = _new_key(), (self._name, self._key)
        self._keep(folder / "ca.crt", PUBLIC, lambda: self._pem)
        self._keep(key_path, PRIVATE, lambda: _pem(key))
        self._keep(path, PUBLIC, lambda: _certificate("MH-pFedHN server", key, hosts, ca))
        self._keep(folder / "superexec.secret", PRIVATE, lambda: secrets.token_bytes(32))
        place = (folder / "ca.crt").resolve()
        settings = FLWR.format(certificate=place).encode()
        self._keep(folder / "flwr.toml", PUBLIC, lambda: settings)

    def make_site(self, site: str) -> None:
        """Make a participant's folder, and its public key in the server's."""
        folder, ssh = self._folder / site, serialization.PrivateFormat.OpenSSH
        private = self._keep(folder / "supernode", PRIVATE, lambda: _pem(_new_key(), ssh))
        key = _load_key(folder / "supernode", private, serialization.load_ssh_private_key)
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        line = public + f" {site}\n".encode()
        self._keep(folder / "ca.crt", PUBLIC, lambda: self._pem)
        self._keep(folder / "supernode.pub", PUBLIC, lambda: line)
        self._keep(folder / "superexec.secret", PRIVATE, lambda: secrets.token_bytes(32))
        self._keep(self._folder / "server" / "supernodes" / f"{site}.pub", PUBLIC, lambda: line)


def self_signed(host: str) -> tuple[bytes, bytes, bytes]:
    """Return a CA certificate, the certificate that it signs for a host, and its key, as PEM."""
    ca_key, key = _new_key(), _new_key()
    authority = _certificate("MH-pFedHN", ca_key)
    issuer = x509.load_pem_x509_certificate(authority).subject
    return authority, _certificate("MH-pFedHN", key, [host], (issuer, ca_key)), _pem(key)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str] = (),
    ca: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None = None,
) -> bytes:
    """Return a certificate for `hosts` that `ca` signs; without a `ca` one that signs others."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signs, (issuer, signer) = ca is None, ca or (subject, key)
    usages = {"key_cert_sign", "crl_sign"} if signs else {"digital_signature"}
    now = datetime.now(UTC)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.BasicConstraints(ca=signs, path_length=0 if signs else None), True),
        (x509.KeyUsage(**{usage: usage in usages for usage in USAGES}), True),
    ]
    if not signs:
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        extensions += [(names, False), (purpose, False), (issuer_key, False)]
    builder = x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(hours=1),  # clocks differ
        not_valid_after=now + timedelta(days=CA_DAYS if signs else SERVER_DAYS),
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _require_hosts(path: Path, hosts: Sequence[str]) -> None:
    certificate = _load_certificate(path, path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    found = {str(name.value) for name in names.value}
    if not set(hosts) <= found:
        raise ConfigError(
            f"{path} is for {listing(sorted(found))}; asked for {listing(hosts)}. Delete it to get "
            "a new one from the same CA (participants keep their files), or use --force."
        )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _load_certificate(path: Path, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(f"{path} is no readable certificate: {error}") from error


def _load_key(
    path: Path, pem: bytes, load: Callable[[bytes, None], object]
) -> ec.EllipticCurvePrivateKey:
    try:
        key = load(pem, None)
    except ValueError as error:
        raise ConfigError(f"{path} is no readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic curve key, which Flower needs.")
    return key
