"""A deployment as plain processes: TLS, SuperNode keys, process isolation, three participants."""

import json
from pathlib import Path

import psutil

from common.config import RunConfig
from experiments.deploy.certificates import make_certs
from tests.support.deployment import Deployment, RecordingProxy, tls_records, wait_until
from tests.support.tiny import HERE, tiny_config

SITES = {"site-a": f"{HERE}:small", "site-b": f"{HERE}:normed"}
THREE = {**SITES, "site-c": f"{HERE}:wide"}


def deployed_config(folder: Path, **overrides: object) -> RunConfig:
    settings: dict[str, object] = {
        "rounds": 2,
        "max_in_flight": 0,
        "buffer_size": 0,
        "evaluation": "fused",
        "min_clients": 2,
        "wait_for_clients_s": 120.0,
        "message_timeout_s": 120.0,
        "checkpoint_every": 1,
        **overrides,
    }
    return tiny_config(folder, **settings)


def require_no_way_around(deployment: Deployment, proxy: RecordingProxy) -> None:
    """Whoever is connected to the SuperLink came through the proxy."""
    superlink = psutil.Process(deployment.processes["superlink"].pid)
    found = superlink.net_connections("tcp")
    callers = {c.raddr.port for c in found if c.raddr and c.laddr.port == deployment.port}
    assert len(callers) >= len(THREE) + 2  # the sites, SuperExec and ServerApp
    assert callers <= proxy.outlets


def test_three_sites_train_over_tls_and_a_stranger_is_refused(tmp_path: Path) -> None:
    with Deployment(tmp_path, list(THREE)) as deployment:
        proxy = RecordingProxy(deployment.port)
        deployment.entrance = proxy.port  # of sites, `serve`, its ServerApp and the command line
        deployment.start_superlink()
        deployment.start_server()
        for i, (site, model) in enumerate(THREE.items()):
            deployment.register(site)
            deployment.start_site(site, model=model, partition_id=i, num_partitions=6)
        make_certs(tmp_path / "strangers", hosts=["127.0.0.1"], sites=["stranger"])
        (tmp_path / "strangers" / "stranger" / "ca.crt").write_bytes(
            (deployment.certs / "site-a" / "ca.crt").read_bytes()
        )
        deployment.start_site("stranger", key="../strangers/stranger", partition_id=3)
        config = deployed_config(tmp_path, min_clients=3)
        deployment.run(config)
        deployment.wait_for_round(config, 1)
        require_no_way_around(deployment, proxy)
        ended = deployment.wait_for_status(config, {"completed", "failed"}, 500)
        wait_until(lambda: "305" in deployment.log("stranger"), 60, "the stranger has been refused")
        status = wait_until(
            lambda: (s := deployment.status()).startswith("finished") and s, 30, "Flower knows"
        )
        proxy.close()

    assert ended == "completed"
    assert "Failed to activate SuperNode" in deployment.log("stranger")
    assert deployment.log("superlink").count("Activated node_id=") == len(THREE)
    assert status == "finished:completed"
    rows = deployment.rows(config)
    assert [(r["num_accepted"], r["num_failed"]) for r in rows] == [(3, 0), (3, 0)]
    meta = json.loads(next(tmp_path.glob("run/checkpoint/*2/meta.json")).read_text())
    keys = {client["client_id"]: client["key"] for client in meta["registry"]}
    assert keys.keys() == THREE.keys()
    assert all(key.startswith("SHA256:") for key in keys.values())
    assert len(set(keys.values())) == 3
    assert len(list((tmp_path / "state").glob("site-*/personal_model.safetensors"))) == 3

    streams = [bytes(s) for s in proxy.streams if s]
    assert sum(len(s) for s in streams) > 100_000
    for stream in streams:
        assert 22 in tls_records(stream)  # a handshake, and nothing but TLS records after it
        for word in (b"site-a", b"theta", b"delta", b"output-dir", b"HTTP/1.1", b"POST /v1"):
            assert word not in stream
