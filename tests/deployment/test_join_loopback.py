"""Real processes on loopback: a federation of participants that came by `mh-pfedhn join`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from client_app.warm.place import Place
from experiments.engines.home import PROJECT_ROOT
from experiments.engines.loopback import Loopback
from tests.support.tiny import HERE, tiny_config

SITES = ("site-a", "site-b")
PATIENCE_S = 420.0  # a busy machine takes minutes to start a dozen Python processes


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def join(loopback: Loopback, client_id: str) -> subprocess.Popen[bytes]:
    file = loopback.folder / f"{client_id}.toml"
    file.write_text(
        f'client-id = "{client_id}"\nserver = "127.0.0.1:{loopback.port}"\ninsecure = true\n'
        f'model = "{HERE}:{"normed" if client_id == "site-a" else "small"}"\n'
        f'dataset = "{HERE}:patterns"\nimage-size = 8\ncache-dir = "cache"\nstate-dir = "state"\n'
    )
    with (loopback.folder / f"{client_id}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments", "join", str(file)],
            env=loopback.environment("unused"),
            cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow  # a minute on an idle machine, seven on one that is ten times overbooked
def test_joined_participants_train_lose_a_node_and_a_worker_and_own_a_model(tmp_path: Path) -> None:
    rounds = 4
    config = tiny_config(
        tmp_path, rounds=rounds, evaluation="fused", min_clients=2, max_in_flight=0, buffer_size=0
    ).with_overrides({"wait-for-clients-s": 600.0, "message-timeout-s": 600.0})
    metrics = tmp_path / "run" / "metrics.jsonl"

    def done() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    with Loopback(tmp_path, extra_env={"PYTHONPATH": str(PROJECT_ROOT)}) as loopback:
        joined = {name: join(loopback, name) for name in SITES}
        try:
            run = loopback.begin(config)
            wait_until(lambda: done() >= 1 or run.poll() is not None, "a round")
            assert run.poll() is None, loopback.log("run").read_text()
            workers = {name: Place(tmp_path / "state" / name / "worker") for name in SITES}
            pids = {name: place.running() for name, place in workers.items()}
            assert None not in pids.values()
            os.kill(pids["site-a"] or 0, signal.SIGKILL)  # the worker: nothing may be lost
            wait_until(lambda: run.poll() is not None, "the end of the run")
            assert loopback.status() == "finished:completed", loopback.log("run").read_text()
            assert workers["site-a"].running() not in (None, pids["site-a"])
            assert workers["site-b"].running() == pids["site-b"]  # one process for all messages
            node = next(
                p
                for p in psutil.Process(joined["site-b"].pid).children()
                if "flower-supernode" in " ".join(p.cmdline())
            )
            node.kill()  # join starts another
            log = tmp_path / "site-b.log"
            wait_until(lambda: "the SuperNode ended" in log.read_text(), "join to notice")
            wait_until(lambda: log.read_text().count("SuperNode ID") == 2, "join to start again")
        finally:
            for process in joined.values():
                process.send_signal(signal.SIGINT)
            codes = [process.wait(60.0) for process in joined.values()]
    assert codes == [0, 0]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, rounds + 1))
    for name in SITES:
        facts = json.loads((tmp_path / "state" / name / "personal_model.json").read_text())
        assert facts["program"] == "personal_model.pt2"
        assert "your model" in (tmp_path / f"{name}.log").read_text()
    left = [p for place in workers.values() if (p := place.running())]
    assert left == []
