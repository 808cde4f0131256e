"""What docker-compose.yml promises: who shares a network with whom, and what each site declares."""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from client_app.models.registry import MODEL_NAMES
from common.config import NodeConfig
from experiments.deploy.join import add_join_parser
from experiments.deploy.settings import read_settings

ROOT = Path(__file__).parents[3]
SITES = ("site-a", "site-b", "site-c")


def services(name: str = "docker-compose.yml") -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())["services"]


def test_participants_share_a_network_with_the_gateway_alone() -> None:
    networks = {name: set(service.get("networks", [])) for name, service in services().items()}
    assert networks["superlink"] == networks["server"] == networks["run"] == {"server"}
    for site in SITES:
        assert networks[site] == {site}
        assert {name for name, its in networks.items() if site in its} == {site, "gateway"}
    assert [name for name, service in services().items() if "ports" in service] == ["gateway"]


def test_nobody_sees_the_secrets_of_another() -> None:
    for site in SITES:
        mounted = [volume.split(":")[0] for volume in services()[site]["volumes"]]
        assert mounted == [f"certs-{site}", f"state-{site}", "/flwr"]
    holders = [n for n, s in services().items() if "certs-ca:/certs/ca" in s.get("volumes", [])]
    assert holders == ["certs"]


ROLES = {
    "superlink": {
        *("ca.crt", "server.crt", "server.key", "superexec.secret", "supernodes", "flwr.toml")
    },
    "server": {"ca.crt", "superexec.secret"},
    "gateway": {"ca.crt", "server.crt", "server.key"},
    "register": {"ca.crt", "supernodes"},
    "run": {"ca.crt", "supernodes"},
    "show": {"ca.crt", "supernodes"},
}


def test_every_role_holds_what_it_needs(tmp_path: Path) -> None:
    """docker/certs.sh, run on a folder of this test; what a service mounts is what it holds."""
    for folder in ("host", "gateway", "operator"):
        (tmp_path / folder).mkdir()
    script = tmp_path / "certs.sh"
    script.write_text((ROOT / "docker/certs.sh").read_text().replace("/certs", str(tmp_path)))
    for _ in range(2):  # repeating it changes nothing
        subprocess.run(["bash", script, "--site", "site-a"], check=True, capture_output=True)
    found = services()
    for role, files in ROLES.items():
        (volume,) = [v for v in found[role]["volumes"] if v.startswith("certs-")]
        name, _, place = volume.partition(":")
        assert place == "/certs:ro"
        folder = tmp_path / name.removeprefix("certs-")
        assert {path.name for path in folder.iterdir()} == files
        private = [path for path in folder.iterdir() if path.suffix in (".key", ".secret")]
        assert {path.stat().st_mode & 0o777 for path in private} <= {0o600}


@pytest.mark.parametrize("name", services())
def test_a_container_can_do_no_more_than_its_work(name: str) -> None:
    service = services()[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"] <= 512
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert not {"privileged", "cap_add", "user", "pid", "ipc"} & service.keys()
    written = [v for v in service.get("volumes", []) if not v.endswith(":ro")]
    assert all(v.partition(":")[0] not in ("/", "/app", "/opt/docker") for v in written)


def test_the_image_is_not_roots() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER app"]


def test_what_lives_on_is_started_again_without_end() -> None:
    for name in ("superlink", "server", "gateway", *SITES):
        assert services()[name]["restart"] == "unless-stopped"
        assert "healthcheck" in services()[name]


@pytest.mark.parametrize("site", SITES)
def test_each_site_declares_itself(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = argparse.ArgumentParser()
    add_join_parser(parser.add_subparsers(required=True))
    for name in ("docker-compose.yml", "docker-compose.insecure.yml"):
        command = services(name)[site]["command"]
        assert command[:2] == ["mh-pfedhn", "join"]
        words = [word.replace("/opt/docker", str(ROOT / "docker")) for word in command[1:]]
        found = read_settings(parser.parse_args(words))
        assert found.client_id == site
        assert found.port == 9094
        assert found.insecure == ("insecure" in name)
        assert (found.key is None) == found.insecure
        node = NodeConfig.parse(found.node)
        assert node.model in MODEL_NAMES
        assert node.partition_id == SITES.index(site)


@pytest.mark.parametrize(
    ("script", "says"), [("run.sh", "run config keys"), ("show.sh", "newest run")]
)
def test_the_operators_commands_explain_themselves(script: str, says: str) -> None:
    command = ["bash", str(ROOT / "docker" / script), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert says in found.stdout
    assert "set -euo" not in found.stdout
