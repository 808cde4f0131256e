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

# What the engineer does afterwards: torch, numpy and the own file; nothing of this project.
FRESH = """
import importlib.util, json, pathlib, sys
import numpy as np, torch
from safetensors.torch import load_file

spec = importlib.util.spec_from_file_location("my_site", sys.argv[1])
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)
folder = pathlib.Path(sys.argv[2])
facts = json.loads((folder / "personal_model.json").read_text())
images, labels = site.load_scans()
rows = np.load(folder / "test_rows.npy", allow_pickle=False)
x, y = torch.from_numpy(images[rows]).unsqueeze(1), torch.from_numpy(labels[rows])
program = torch.export.load(folder / "personal_model.pt2").module()
model = site.small_net(in_channels=1, num_classes=facts["num_classes"])
model.load_state_dict(load_file(folder / "personal_model.safetensors"))
mean, std = (torch.tensor(facts[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
found = [program(x).argmax(1), model.eval()((x / 255 - mean) / std).argmax(1)]
ours = [m for m in sys.modules if m.split(".")[0] in ("client_app", "common", "server_app", "flwr")]
print(json.dumps({"correct": [int((f == y).sum()) for f in found], "of": len(y), "ours": ours}))
"""


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
        'cache-dir = "cache"\nstate-dir = "state"\n'
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
    return next(p for p in children if "flower-supernode" in " ".join(p.cmdline()))


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
    """Load every personal model in a fresh interpreter, without this project."""
    prefix = deployment.environment("fresh").get("PYTHONPYCACHEPREFIX")  # -I ignores the variable
    cache = ["-X", f"pycache_prefix={prefix}"] if prefix else []
    for site in SITES:
        own = deployment.folder / "participants" / site
        state = own / "state" / site
        done = subprocess.run(
            [sys.executable, "-I", *cache, "-c", FRESH, str(own / "my_site.py"), str(state)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        facts = json.loads((state / "personal_model.json").read_text())
        assert found["ours"] == []
        assert found["correct"] == [facts["num_correct"]] * 2
        assert found["of"] == facts["num_test"] == 150
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
