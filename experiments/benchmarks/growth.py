"""Time and memory over many rounds, and over the number of clients (issue 6, point 5).

Seconds are CPU seconds of the process: they stay flat on a machine that others use too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from common.config import RunConfig
from experiments.benchmarks.child import measure_in_child
from experiments.benchmarks.rounds import HERE, SCHEDULES, Workload


def grow(work: Workload, *, rounds: int, clients: Sequence[int]) -> dict[str, Any]:
    """Run idle clients for many rounds, and for a few rounds with more and more clients.

    Each in a process of its own. Idle clients exchange a CNN's parameters and compute nothing, so
    that what is left is the server (as in the preset cifar100-parallel), the wire and Flower.
    """
    long = _run(work, f"rounds-{rounds}", rounds=rounds, num_clients=min(clients))
    sizes = [_run(work, f"clients-{n}", rounds=4, num_clients=n) for n in clients]
    result = {"rounds": long, "clients": sizes}
    draw(result, work.folder.parent / "growth.png")
    return result


def _run(work: Workload, name: str, *, rounds: int, num_clients: int) -> dict[str, Any]:
    arguments = [str(work.folder / name), str(rounds), str(num_clients)]
    return {"num_clients": num_clients} | measure_in_child(
        "experiments.benchmarks.growth", arguments
    )


def measure(folder: Path, rounds: int, num_clients: int) -> dict[str, Any]:
    """Run here; return resident bytes after each round, and CPU and wall seconds of each round."""
    from experiments.run.engines.inprocess import run_inprocess
    from server_app.output.run_folder import RunFolder

    resident: list[int] = []
    used = [time.process_time()]
    add_round = RunFolder.add_round

    def add_and_weigh(self: RunFolder, row: dict[str, float], total: int) -> None:
        add_round(self, row, total)
        resident.append(psutil.Process().memory_info().rss)
        used.append(time.process_time())

    RunFolder.add_round = add_and_weigh  # type: ignore[assignment]
    config = RunConfig.parse(
        {
            "method": "mh-pfedhn",
            "models": f"{HERE}:idle_model",
            "dataset": f"{HERE}:few_pictures",
            "partition": "iid",
            "rounds": rounds,
            "num-partitions": num_clients,
            "min-client-examples": 2,
            "batch-size": 1024,
            "checkpoint-every": rounds,
            "cache-dir": str(folder.parent / "cache"),
            "output-dir": str(folder),
        }
        | {key.replace("_", "-"): value for key, value in SCHEDULES["parallel"].items()}
    )
    run_inprocess(config, num_clients=num_clients)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "num_clients": num_clients,
        "resident_bytes": resident,
        "seconds": [later - earlier for earlier, later in pairwise(used)],
        "wall_seconds": [row["seconds_round"] for row in rows],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw both: over rounds on the left, over clients on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    over_rounds, over_clients = figure.subplots(1, 2)
    long = result["rounds"]
    if "skipped" not in long:
        over_rounds.plot([b / 2**20 for b in long["resident_bytes"]], label="resident MiB")
        after_first = [1000 * s for s in long["seconds"][1:]]
        over_rounds.plot(range(1, len(after_first) + 1), after_first, label="CPU ms a round")
    over_rounds.set(xlabel="round", title="flat over rounds", ylim=(0, None))
    sizes = [row for row in result["clients"] if "skipped" not in row]
    counts = [row["num_clients"] for row in sizes]
    over_clients.plot(counts, [max(r["resident_bytes"]) / 2**20 for r in sizes], "o-", label="MiB")
    over_clients.plot(
        counts, [1000 * min(r["seconds"]) for r in sizes], "o-", label="CPU ms a round"
    )
    over_clients.set(xlabel="clients", title="linear in clients", xlim=(0, None), ylim=(0, None))
    over_rounds.legend()
    over_clients.legend()
    figure.savefig(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
