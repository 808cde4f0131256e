"""kill -9 of every kind of process, in training, with a count of what was lost."""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from common.config import RunConfig
from experiments.run.engines.processes import is_alive
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


def newest(config: RunConfig) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows and server steps by site of one checkpoint, while the run may write the next."""

    def read() -> tuple[list[dict[str, Any]], dict[str, int]] | None:
        with suppress(FileNotFoundError, ValueError):  # another has just replaced it, or none yet
            path = max((Path(config.run.output_dir) / "checkpoint").glob("checkpoint-*"))
            tensors = load_file(path / "tensors.safetensors")
            rows = json.loads((path / "meta.json").read_text())["rows"]
            return rows, {s: int(tensors[f"adam.step.embeddings.{s}"].item()) for s in SITES}
        return None

    return wait_until(read, 60, "a whole checkpoint")  # type: ignore[no-any-return]


def accepted(config: RunConfig) -> list[int]:
    return [int(row["num_accepted"]) for row in newest(config)[0]]


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


def kill_host_alone(deployment: Deployment) -> None:
    """Kill -9 of the process `serve`: SuperExec and ServerApp must not outlive it."""
    family = [process for process in deployment.started_by("server") if is_alive(process)]
    assert any("flwr-serverapp" in " ".join(process.cmdline()) for process in family)
    deployment.processes["server"].kill()
    deployment.processes["server"].wait()
    wait_until(lambda: not any(is_alive(p) for p in family), 30, f"all have ended: {family}")
    deployment.kill("server")


def test_kill_9_of_a_site_in_training_and_its_return(tmp_path: Path) -> None:
    config = deployed_config(tmp_path, rounds=60, min_clients=1, min_fraction=0.5)
    with begin(tmp_path) as deployment:
        deployment.run(config)
        deployment.wait_for_round(config, 2)
        deployment.kill("site-b")
        wait_until(lambda: accepted(config)[-1] == 1, 180, "one is left")
        restart_site(deployment, "site-b")
        wait_until(lambda: accepted(config)[-1] == 2, 300, "it is back")
        rows, steps = newest(config)
        came = [int(row["num_accepted"]) for row in rows]
        lost = sum(2 - number for number in came)
        print(f"accepted by round {came}, client-rounds lost {lost}")
        assert lost >= 1
        assert min(came) == 1  # the run went on meanwhile
        assert steps["site-b"] >= 3  # its own embedding, not a fresh one
        assert steps == {"site-a": len(came), "site-b": len(came) - lost}


def test_kill_9_of_the_server_app_and_resume(tmp_path: Path) -> None:
    config = deployed_config(tmp_path, rounds=60)
    with begin(tmp_path) as deployment:
        deployment.run(config)
        deployment.wait_for_round(config, 3)
        kill_host_alone(deployment)
        before, kept = deployment.rows(config), len(newest(config)[0])
        done = len(before)
        print(f"rounds finished {done}, rounds lost {done - kept}")
        assert done - kept <= 1  # checkpoint-every 1: at most the one whose checkpoint was coming
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        wait_until(lambda: deployment.status().startswith("finished"), 180, "Flower has noticed")
        deployment.start_server()
        resumed = config.with_overrides({"resume-from": config.run.output_dir, "rounds": done + 2})
        deployment.run(resumed)
        assert deployment.wait_for_status(resumed, {"completed", "failed"}) == "completed"
        rows, steps = newest(config)
        assert [row["round"] for row in rows] == list(range(1, done + 3))
        assert deployment.rows(config)[:kept] == before[:kept]  # to the microsecond: not repeated
        assert [row["num_accepted"] for row in rows] == [2] * (done + 2)
        assert steps == dict.fromkeys(SITES, done + 2)


def paused(folder: Path) -> list[dict[str, Any]]:
    """Return what every site that was told has noted of a pause."""
    files = (folder / "state" / site / "pause.json" for site in SITES)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def test_sites_know_that_serve_was_stopped_and_that_the_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM to `serve` alone, as a container's end: its ServerApp says goodbye before it ends.

    One by one: a site that trains is not reached, for a SuperNode takes one message at a time.
    """
    config = deployed_config(tmp_path, rounds=60, max_in_flight=1, buffer_size=1)
    with begin(tmp_path) as deployment:
        deployment.run(config)
        deployment.wait_for_round(config, 2)
        began, process = time.monotonic(), deployment.processes["server"]
        family = deployment.started_by("server")
        process.terminate()
        assert process.wait(timeout=30) == 0
        seconds = time.monotonic() - began
        print(f"serve ended after {seconds:.1f} s")
        assert not any(is_alive(process) for process in family)
        log = deployment.log("server") + deployment.tails()
        deployment.kill("server")
        wait_until(lambda: paused(tmp_path), 60, log)
        done = len(deployment.rows(config))
        for note in paused(tmp_path):
            assert note["continued"] is False
            assert note["round"] in (done - 1, done)
        wait_until(lambda: deployment.status().startswith("finished"), 180, "Flower has noticed")
        deployment.start_server()
        resumed = config.with_overrides({"resume-from": config.run.output_dir, "rounds": done + 1})
        deployment.run(resumed)
        assert deployment.wait_for_status(resumed, {"completed", "failed"}) == "completed"
        assert all(note["continued"] for note in paused(tmp_path))


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
