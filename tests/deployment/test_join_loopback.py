"""Real processes, TLS, keys: participants that came by `mh-pfedhn join` and leave with a model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from client_app.worker.link import WorkerRecord
from common.config import RunConfig
from experiments.examples import my_site
from tests.support.deployment import REPOSITORY, Deployment, wait_until
from tests.support.tiny import HERE, tiny_config

SITES = ("site-a", "site-b")
ROUNDS = 4
PATIENCE_S = 420.0  # a busy machine takes minutes to start a dozen Python processes


def settings_file(deployment: Deployment, site: str) -> Path:
    """Write what a participant declares, in a folder of its own with its own Python file."""
    own = deployment.folder / "participants" / site
    own.mkdir(parents=True)
    shutil.copy(my_site.__file__, own)
    secrets = deployment.certs / site
    (own / "join.toml").write_text(
        f'client-id = "{site}"\nserver = "127.0.0.1:{deployment.entrance}"\n'
        f'certificate = "{secrets}/ca.crt"\nkey = "{secrets}/supernode"\n'
        'model = "my_site:small_net"\ndataset = "my_site:load_scans"\n'
        f'global-model = "{HERE}:small"\ncache-dir = "cache"\nstate-dir = "state"\n'
    )
    return own / "join.toml"


@contextmanager
def joined(deployment: Deployment, site: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `mh-pfedhn join` until the context is left by Ctrl-C."""
    file = settings_file(deployment, site)
    with (deployment.folder / f"{site}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments", "join", str(file)],
            env=deployment.environment(site),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60.0)


def supernode_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    children = psutil.Process(process.pid).children()
    return next(p for p in children if "deploy.supernode" in " ".join(p.cmdline()))


def joined_config(folder: Path) -> RunConfig:
    config = tiny_config(
        folder,
        rounds=ROUNDS,
        evaluation="fused",
        global_model=f"{HERE}:small",
        image_size=32,
        chunk_size=512,
        embedding_std=0.05,
        min_clients=2,
        max_in_flight=0,
        buffer_size=0,
        checkpoint_every=1,
    )
    return config.with_overrides({"wait-for-clients-s": 600.0, "message-timeout-s": 600.0})


def check_models(deployment: Deployment) -> None:
    for site in SITES:
        state = deployment.folder / "participants" / site / "state" / site
        facts = json.loads((state / "personal_model.json").read_text())
        assert facts["num_test"] == 90
        assert (state / facts["program"]).stat().st_size > 0
        assert "your model" in deployment.log(site)


@pytest.mark.slow  # two minutes on an idle machine, ten on one that is ten times overbooked
def test_joined_participants_lose_a_worker_and_a_node_and_own_a_model(tmp_path: Path) -> None:
    config = joined_config(tmp_path)
    with Deployment(tmp_path, list(SITES)) as deployment, ExitStack() as stack:
        deployment.start_superlink()
        deployment.start_server()
        processes = {}
        for site in SITES:
            deployment.register(site)
            processes[site] = stack.enter_context(joined(deployment, site))

        def worker(site: str) -> int | None:
            record = WorkerRecord.read(tmp_path / f"participants/{site}/state/{site}/worker")
            return record and record.pid

        deployment.run(config)
        deployment.wait_for_round(config, 1, PATIENCE_S)
        pids = {site: worker(site) for site in SITES}
        assert None not in pids.values()
        os.kill(pids["site-a"] or 0, signal.SIGKILL)  # the worker: nothing may be lost
        ended = deployment.wait_for_status(config, {"completed", "failed"}, PATIENCE_S)
        assert ended == "completed", deployment.tails()
        assert worker("site-a") not in (None, pids["site-a"])
        assert worker("site-b") == pids["site-b"]  # one process for all messages
        supernode_of(processes["site-b"]).kill()  # join starts another, when it is let in again
        wait_until(
            lambda: deployment.log("site-b").count("SuperNode ID") == 2, PATIENCE_S, "it is back"
        )
        assert "the SuperNode ended" in deployment.log("site-b")
        check_models(deployment)
    assert [process.returncode for process in processes.values()] == [0, 0]
    rows = deployment.rows(config)
    assert [(row["round"], row["num_accepted"]) for row in rows] == [
        (number, 2) for number in range(1, ROUNDS + 1)
    ]
    wait_until(lambda: not any(map(worker, SITES)), 30, "no worker is left")
