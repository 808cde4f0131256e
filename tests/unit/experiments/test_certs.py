"""`mh-pfedhn certs`: what it makes is accepted by TLS, OpenSSH readers and Flower."""

import argparse
import asyncio
import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from common.errors import ConfigError
from experiments.deploy.certificates import add_certs_parser, make_certs

HOSTS = ["localhost", "127.0.0.1"]


def tree(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


async def shake_hands(folder: Path, server_name: str) -> str:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
    client = ssl.create_default_context(cafile=str(folder / "site-a" / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    listener = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=server)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client, server_hostname=server_name
        )
        version = writer.get_extra_info("ssl_object").version()
        writer.close()
    return version


def test_server_certificate_verifies_under_its_host_names_alone(tmp_path: Path) -> None:
    make_certs(tmp_path, hosts=HOSTS, sites=["site-a"])
    for host in HOSTS:
        assert asyncio.run(shake_hands(tmp_path, host)) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'elsewhere'"):
        asyncio.run(shake_hands(tmp_path, "elsewhere"))


def test_supernode_keys_are_p384_in_openssh_format(tmp_path: Path) -> None:
    make_certs(tmp_path, hosts=HOSTS, sites=["site-a", "site-b"])
    publics = set()
    for site in ("site-a", "site-b"):
        private = (tmp_path / site / "supernode").read_bytes()
        assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
        key = serialization.load_ssh_private_key(private, None)
        assert uses_nist_ec_curve(key.public_key())
        line = (tmp_path / site / "supernode.pub").read_bytes()
        assert line.startswith(b"ecdsa-sha2-nistp384 ")
        assert serialization.load_ssh_public_key(line) == key.public_key()
        assert (tmp_path / "server" / "supernodes" / f"{site}.pub").read_bytes() == line
        publics.add(line)
    assert len(publics) == 2


def test_private_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_certs(tmp_path / "certs", hosts=HOSTS, sites=["site-a"])
    finally:
        os.umask(before)
    modes = {str(p.relative_to(tmp_path / "certs")): stat.S_IMODE(p.stat().st_mode) for p in made}
    private = {name for name, mode in modes.items() if mode == 0o600}
    assert private == {
        *("ca/ca.key", "server/server.key", "server/superexec.secret"),
        *("site-a/supernode", "site-a/superexec.secret"),
    }
    assert {mode for name, mode in modes.items() if name not in private} == {0o644}
    assert len((tmp_path / "certs/site-a/superexec.secret").read_bytes()) == 32


def test_again_changes_nothing_and_a_new_site_is_added(tmp_path: Path) -> None:
    make_certs(tmp_path, hosts=HOSTS, sites=["site-a"])
    first = tree(tmp_path)
    assert make_certs(tmp_path, hosts=HOSTS, sites=["site-a"]) == []
    assert tree(tmp_path) == first
    made = make_certs(tmp_path, hosts=["localhost"], sites=["site-a", "site-b"])
    assert {p.parent.name for p in made} == {"site-b", "supernodes"}
    assert {k: v for k, v in tree(tmp_path).items() if "site-b" not in k} == first


def test_force_makes_everything_anew(tmp_path: Path) -> None:
    make_certs(tmp_path, hosts=HOSTS, sites=["site-a"])
    first = tree(tmp_path)
    make_certs(tmp_path, hosts=HOSTS, sites=["site-a"], force=True)
    second = tree(tmp_path)
    assert first.keys() == second.keys()
    settings = [name for name in first if str(name).endswith("flwr.toml")]
    assert [name for name in first if first[name] == second[name]] == settings
    assert asyncio.run(shake_hands(tmp_path, "localhost")) == "TLSv1.3"


def test_other_hosts_are_refused_until_the_certificate_is_deleted(tmp_path: Path) -> None:
    make_certs(tmp_path, hosts=["localhost"], sites=["site-a"])
    with pytest.raises(ConfigError, match=r"is for localhost; asked for fl.example.org. Delete it"):
        make_certs(tmp_path, hosts=["fl.example.org"], sites=[])
    (tmp_path / "server" / "server.crt").unlink()
    made = make_certs(tmp_path, hosts=["fl.example.org"], sites=["site-a"])
    assert {p.name for p in made} == {"server.crt", "server.key"}
    assert asyncio.run(shake_hands(tmp_path, "fl.example.org")) == "TLSv1.3"


def test_half_a_ca_and_bad_names_are_refused(tmp_path: Path) -> None:
    make_certs(tmp_path, hosts=HOSTS, sites=[])
    (tmp_path / "ca" / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"only one of ca.crt and ca.key"):
        make_certs(tmp_path, hosts=HOSTS, sites=["site-a"])
    for bad in ("../x", "ca", "server", "", "a b"):
        with pytest.raises(ConfigError, match="use up to 63 letters"):
            make_certs(tmp_path, hosts=HOSTS, sites=[bad])


def test_command_says_who_gets_what(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_certs_parser(parser.add_subparsers())
    args = parser.parse_args(["certs", str(tmp_path), "--site", "site-a", "--host", "localhost"])
    assert args.command(args) == 0
    said = capsys.readouterr().out
    assert f"flwr supernode register {tmp_path}/server/supernodes/site-a.pub --name site-a" in said
    assert f"Participant site-a gets {tmp_path}/site-a" in said
    assert args.command(args) == 0
    assert f"all is there already in {tmp_path}" in capsys.readouterr().out
