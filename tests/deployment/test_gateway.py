"""docker/nginx.conf, run by a real nginx before a real SuperLink: fleet API and health, no more."""

import http.client
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.run.engines.processes import free_port
from tests.support.deployment import REPOSITORY, Deployment
from tests.support.tiny import HERE, tiny_config

NGINX = shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
CLOSED = (REPOSITORY / "docker" / "closed-paths.txt").read_text().split()

MISSING = NGINX is None or not STREAM.exists()
pytestmark = pytest.mark.skipif(MISSING, reason="nginx or its stream module is not installed here")


def adapted(deployment: Deployment, port: int) -> str:
    """Return the containers' nginx.conf with the addresses, ports and folders of this test."""
    text = (REPOSITORY / "docker" / "nginx.conf").read_text()
    for old, new in (
        (" /tmp/", f" {deployment.folder}/"),
        (" /dev/stderr", f" {deployment.folder}/nginx.log"),
        (" /certs/", f" {deployment.certs}/server/"),
        ("unix:/tmp/", f"unix:{deployment.folder}/"),
        ("listen 9443;", f"listen 127.0.0.1:{port};"),
        ("modules/ngx_stream_module.so", str(STREAM)),
        ("set $superlink superlink;", "set $superlink 127.0.0.1;"),
        ("$superlink:8000", f"$superlink:{deployment.port}"),
    ):
        assert old in text, f"docker/nginx.conf no longer says {old!r}"
        text = text.replace(old, new)
    return text


@contextmanager
def gateway(deployment: Deployment) -> Iterator[int]:
    """Run nginx until the context is left; returns its port."""
    port, file = free_port(), deployment.folder / "nginx.conf"
    file.write_text(adapted(deployment, port))
    user = " user root;" if os.geteuid() == 0 else ""  # the folder is this user's alone
    command = [str(NGINX), "-c", str(file), "-g", f"daemon off;{user}"]
    with (deployment.folder / "nginx.out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deployment.wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def answer(deployment: Deployment, port: int, path: str, method: str = "POST") -> int:
    """Return the status; `http.client` sends a path as it stands, with every dot and slash."""
    trusted = ssl.create_default_context(cafile=str(deployment.certs / "site-a" / "ca.crt"))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trusted)
    headers = {"Content-Type": "application/protobuf"}
    connection.request(method, path, body=b"", headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_nginx_passes_the_fleet_api_and_health_and_nothing_else(tmp_path: Path) -> None:
    with Deployment(tmp_path, ["site-a"]) as deployment:
        deployment.start_superlink()
        open_there = [p for p in CLOSED if answer(deployment, deployment.port, p) != 404]
        assert "/v1/control/list-runs" in open_there  # the SuperLink itself does answer
        assert "/v1/runtime/acquire-task" in open_there
        with gateway(deployment) as port:
            assert {path: answer(deployment, port, path) for path in CLOSED} == dict.fromkeys(
                CLOSED, 404
            )
            assert answer(deployment, port, "/v1/fleet/activate-node") == 401  # without a key
            assert answer(deployment, port, "/v1/fleet/activate-node", "GET") == 403
            assert answer(deployment, port, "/health", "GET") == 200
            assert answer(deployment, port, "/v1/control/list-runs", "GET") == 404


def test_what_is_no_tls_writes_no_log(tmp_path: Path) -> None:
    """A line for each would be 45 GB a day from one stranger."""
    broken = b"\x16\x03\x01\xff\xff" + bytes(16)
    with Deployment(tmp_path, ["site-a"]) as deployment, gateway(deployment) as port:
        log = deployment.folder / "nginx.log"
        before = log.read_bytes()
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), 10) as stream:
                stream.sendall(broken)
                assert len(stream.recv(100)) < 100  # an alert, or nothing
        assert log.read_bytes() == before


@pytest.mark.slow
def test_several_sites_behind_one_address_train_through_it(tmp_path: Path) -> None:
    sites = [f"site-{i}" for i in range(4)]
    with Deployment(tmp_path, sites) as deployment:
        deployment.start_superlink()
        deployment.start_server()
        with gateway(deployment) as port:
            for site in sites:
                deployment.register(site)
            inside, deployment.entrance = deployment.entrance, port
            for i, site in enumerate(sites):
                deployment.start_site(
                    site, model=f"{HERE}:normed", partition_id=i, num_partitions=len(sites)
                )
            deployment.entrance = inside
            schedule = {"max_in_flight": 0, "buffer_size": 0, "min_clients": len(sites)}
            limits = {"wait_for_clients_s": 120.0, "message_timeout_s": 120.0}
            config = tiny_config(tmp_path, rounds=2, **schedule, **limits)
            deployment.run(config)
            assert deployment.wait_for_status(config, {"completed", "failed"}, 400) == "completed"
        assert [row["num_accepted"] for row in deployment.rows(config)] == [len(sites)] * 2
