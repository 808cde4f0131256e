"""Worker: what the process saves that keeps torch, data and model loaded between messages.

A real SuperLink and three real SuperNodes on loopback train the CNN on digits: the deployment that
`mh-pfedhn join` makes, with `warm-worker` off and on. The two take turns, so that a busy machine
hits both alike. The first round of a run is kept apart: it holds the registration and, with the
worker, its start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from common.config import RunConfig
from common.config.keys import to_toml
from experiments.benchmarks.measuring import Row
from experiments.run.engines import processes
from experiments.run.engines.superlink import SuperLink
from experiments.run.presets import EngineSection, Preset

SITES = 3


def worker_part(folder: Path, *, repeats: int, rounds: int = 5) -> Row:
    """Measure seconds of a round, as the server sees them, without and with the worker."""
    runs: dict[str, list[list[float]]] = {"off": [], "on": []}
    for i in range(repeats):
        for mode, seconds in runs.items():
            seconds.append(deployed_rounds(folder / f"worker-{mode}-{i}", mode, rounds))
    rows: dict[str, Row] = {
        mode: {
            "first_seconds": median(run[0] for run in seconds),
            "round_seconds": median(s for run in seconds for s in run[1:]),
            "seconds": seconds,
        }
        for mode, seconds in runs.items()
    }
    rows["on"]["share"] = rows["on"]["round_seconds"] / rows["off"]["round_seconds"]
    return {"rows": rows}


def deployed_rounds(folder: Path, mode: str, rounds: int) -> list[float]:
    """Run a deployment of three sites; return the seconds of each round."""
    settings = {
        "method": "mh-pfedhn",
        "models": "cnn",
        "evaluation": "fused",
        "validation-fraction": 0.0,
        "measure-alone": False,
        "rounds": rounds,
        "min-clients": SITES,
        "output-dir": str(folder / "run"),
    }
    engine = EngineSection(num_clients=SITES)
    preset = Preset("worker", "", engine, RunConfig()).with_config(settings)
    folder.mkdir(parents=True)
    with SuperLink(log=folder / "run.log") as link:
        for i in range(SITES):
            node = {"client-id": f"site-{i}", "partition-id": i, "num-partitions": SITES}
            node |= {"state-dir": str(folder / "state"), "warm-worker": mode}
            start_node(link, f"site-{i}", node)
        link.run(preset.config)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [float(json.loads(line)["seconds_round"]) for line in lines]


def start_node(link: SuperLink, name: str, node_config: Mapping[str, Any]) -> None:
    """Start a SuperNode with a FLWR_HOME of its own; it waits for its SuperLink."""
    folder = link.home / name
    folder.mkdir()
    (folder / "node.toml").write_text(to_toml(node_config), encoding="utf-8")
    words = ["--insecure", "--superlink", f"127.0.0.1:{link.port}", "--host", "127.0.0.1"]
    words += ["--port", str(processes.free_port()), "--node-config", str(folder / "node.toml")]
    env = {"FLWR_HOME": str(folder)}
    link.start("flower-supernode", *words, log=folder / "node.log", env=env)
