"""kill -9 of every kind of process, in training, with a count of what was lost."""

import json
import signal
import time
from pathlib import Path

import pytest

from common.config import RunConfig
from tests.deployment.test_loopback import SITES, deployed_config
from tests.support.deployment import Deployment, wait_until

pytestmark = pytest.mark.slow


def begin(folder: Path) -> Deployment:
    """Everything up, both sites registered."""
    deployment = Deployment(folder, list(SITES))
    deployment.start_superlink()
    deployment.start_server()
    for site in SITES:
        deployment.register(site)
        start_site(deployment, site)
    return deployment


def start_site(deployment: Deployment, site: str) -> None:
    place = list(SITES).index(site)
    deployment.start_site(site, model=SITES[site], partition_id=place, num_partitions=6)


def steps_of(config: RunConfig, site: str) -> int:
    """How many server steps have moved a site's embedding, by the newest checkpoint."""
    import safetensors.torch

    newest = max((Path(config.run.output_dir) / "checkpoint").glob("checkpoint-*"))
    tensors = safetensors.torch.load_file(newest / "tensors.safetensors")
    return int(tensors[f"adam.step.embeddings.{site}"].item())


def restart_site(deployment: Deployment, site: str) -> None:
    """Start a killed site until it is let in, as a container's restart policy does."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        start_site(deployment, site)
        time.sleep(10)
        if deployment.processes[site].poll() is None:
            return
        deployment.processes.pop(site)
    raise AssertionError(f"{site} was not let in again: {deployment.log(site)[-1500:]}")


def test_kill_9_of_a_site_in_training_and_its_return(tmp_path: Path) -> None:
    config = deployed_config(tmp_path, rounds=60, min_clients=1, min_fraction=0.5)
    with begin(tmp_path) as deployment:
        deployment.run(config)
        deployment.wait_for_round(config, 2)
        deployment.kill("site-b")
        wait_until(lambda: deployment.rows(config)[-1]["num_accepted"] == 1, 180, "one is left")
        restart_site(deployment, "site-b")
        wait_until(lambda: deployment.rows(config)[-1]["num_accepted"] == 2, 300, "it is back")
        rows = deployment.rows(config)
        lost = sum(2 - int(row["num_accepted"]) for row in rows)
        print(f"rounds {len(rows)}, client-rounds lost {lost}")
        assert lost >= 1
        assert all(row["num_accepted"] >= 1 for row in rows)  # the run went on meanwhile
        assert steps_of(config, "site-b") >= 3  # its own embedding, not a fresh one
        assert steps_of(config, "site-a") - steps_of(config, "site-b") == lost


def test_kill_9_of_the_server_app_and_resume(tmp_path: Path) -> None:
    config = deployed_config(tmp_path, rounds=60)
    with begin(tmp_path) as deployment:
        deployment.run(config)
        deployment.wait_for_round(config, 3)
        deployment.kill("server")  # superexec and the ServerApp it started
        done = len(deployment.rows(config))
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        wait_until(lambda: deployment.status().startswith("finished"), 180, "Flower has noticed")
        deployment.start_server()
        resumed = config.with_overrides({"resume-from": config.run.output_dir, "rounds": done + 2})
        deployment.run(resumed)
        assert deployment.wait_for_status(resumed, {"completed", "failed"}) == "completed"
        rows = deployment.rows(config)
        assert [row["round"] for row in rows] == list(range(1, done + 3))
        assert steps_of(config, "site-a") == done + 2  # checkpoint-every 1: no round was lost


def test_kill_9_of_the_superlink_with_a_database(tmp_path: Path) -> None:
    config = deployed_config(tmp_path, rounds=6, message_timeout_s=300.0)
    with begin(tmp_path) as deployment:
        deployment.run(config)
        deployment.wait_for_round(config, 2)
        deployment.kill("superlink", signal.SIGKILL)
        time.sleep(3)
        deployment.start_superlink()
        assert deployment.wait_for_status(config, {"completed", "failed"}, 400) == "completed"
        rows = deployment.rows(config)
        assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
        lost = sum(2 - int(row["num_accepted"]) for row in rows)
        print(f"client-rounds lost {lost}")
        assert lost <= 2
