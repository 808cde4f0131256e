"""The command line on a Ray cluster that is there: two nodes on loopback, and what a job asks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from experiments.__main__ import main
from experiments.run.engines import processes
from experiments.run.engines.home import bytecode_cache
from tests.simulation.test_ray_engine import PROJECT_ROOT, experiment, untimed_rows
from tests.support.deployment import wait_until

__all__ = ["experiment"]


@contextmanager
def ray_node(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """One node of a Ray cluster, of one CPU, until the end of the context."""
    command = [processes.find_program("ray"), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
    with log.open("wb") as output:
        node = subprocess.Popen([*command, *words], stdout=output, stderr=output)
    try:
        wait_until(lambda: b"Ray runtime started" in log.read_bytes(), 120, "a Ray node runs")
        yield node
    finally:
        node.terminate()
        node.wait(60)


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """Two Ray nodes on loopback; RAY_ADDRESS names them."""
    address = f"127.0.0.1:{processes.free_port()}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:  # sockets: short
        head = ("--head", f"--port={address.split(':')[1]}", "--include-dashboard=false")
        with (
            ray_node(tmp_path / "head.log", *head, f"--temp-dir={temporary}") as first,
            ray_node(tmp_path / "worker.log", f"--address={address}") as second,
        ):
            monkeypatch.setenv("RAY_ADDRESS", address)
            yield first, second


def has_clients(node: subprocess.Popen[bytes]) -> bool:
    """Whether a simulated client's process belongs to this node."""
    names = []
    for process in psutil.Process(node.pid).children(recursive=True):
        try:
            names.append(process.name())
        except psutil.Error:
            continue
    return any("ClientApp" in name for name in names)


@pytest.mark.slow
def test_nodes_of_a_cluster_share_the_clients(
    experiment: str, tmp_path: Path, cluster: tuple[subprocess.Popen[bytes], ...]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["run", experiment, "--engine", "inprocess", "--output-dir", str(one)]) == 0
    command = [sys.executable, "-m", "experiments", "run", experiment, "--engine", "ray"]
    environment = {**os.environ, **bytecode_cache(os.environ)}
    run = subprocess.Popen([*command, "--output-dir", str(two)], cwd=PROJECT_ROOT, env=environment)
    at_work = set()
    while run.poll() is None:
        at_work |= {node.pid for node in cluster if has_clients(node)}
        time.sleep(0.2)
    assert run.returncode == 0
    assert untimed_rows(two) == untimed_rows(one)
    assert at_work == {node.pid for node in cluster}
    assert all(node.poll() is None for node in cluster)  # the run is over, the cluster is not
