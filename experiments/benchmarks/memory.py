"""Memory: a thousand clients in one process, and time and memory over rounds and over clients.

The thousand really train (a few pictures each), all in flight at once, on the in-process engine;
two rounds, for Adam's moments come with the first step. The growth is that of idle clients, so that
what is left is the server, the wire and Flower, in CPU seconds: they stay flat on a machine that
others use too. Every run has a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from experiments.benchmarks.measuring import Row, in_own_process, peak_bytes
from experiments.benchmarks.rounds import HERE, STEADY, Workload, by_round, inprocess
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes

LIMIT_BYTES = 4_000_000_000


def memory_part(work: Workload) -> Row:
    """Run `work.num_clients` CNN clients; return the peak of their process beside the limit."""
    row = {"num_clients": work.num_clients, "limit_bytes": LIMIT_BYTES}
    row |= in_own_process(peak, work)
    return row | {"rows": {"in process": row}}


def peak(work: Workload) -> Row:
    """Run here; return the peak of this process and what its second round took."""
    config = work.config("memory", rounds=STEADY, checkpoint_every=STEADY)
    row = inprocess(work, config, workers=1)
    return row | {"peak_bytes": peak_bytes()}


def growth_part(work: Workload, *, rounds: int, clients: Sequence[int]) -> Row:
    """Run idle clients for many rounds, and for a few rounds with more and more clients."""
    found = {f"{rounds} rounds": _grow(work, rounds, min(clients))}
    found |= {f"{n} clients": _grow(work, 4, n) for n in clients}
    draw(found, work.folder.parent / "growth.png")
    return {"rows": found}


def registered_part(work: Workload, *, registered: Sequence[int], training: int) -> Row:
    """Run light idle clients, `training` a round, drawn from more and more that are registered."""
    settings = {
        "models": f"{HERE}:light_model",
        "dataset": f"{HERE}:handful_pictures",
        "partition": "none",
        "clients_per_round": training,
        "clip_to_median": 0.0,
    }
    rows = {f"{n} registered": _grow(work, 6, n, settings) for n in registered}
    return {"limit_bytes": LIMIT_BYTES, "rows": rows}


def _grow(
    work: Workload, rounds: int, num_clients: int, settings: Mapping[str, Any] | None = None
) -> Row:
    row = in_own_process(growth, replace(work, num_clients=num_clients), rounds, settings or {})
    return {"num_clients": num_clients, "num_rounds": rounds} | row


def growth(work: Workload, rounds: int, settings: Mapping[str, Any]) -> Row:
    """Run here; return resident bytes after each round, and the CPU seconds of each."""

    def probe() -> tuple[int, float]:
        return psutil.Process().memory_info().rss, time.process_time()

    name = f"{work.num_clients}-{rounds}"
    config = work.idle(name, **{"rounds": rounds, "checkpoint_every": rounds, **settings})
    with by_round(Path(config.run.output_dir), probe, every_s=0.005) as found:
        run_inprocess(config, simulated_nodes(work.num_clients))
    resident = [bytes_ for bytes_, _ in found[1:]]
    seconds = [later - earlier for (_, earlier), (_, later) in pairwise(found)]
    return {
        "resident_bytes": resident,
        "seconds": seconds,
        "typical_seconds": sorted(seconds)[len(seconds) // 2],
        "last_bytes": resident[-1],
        "last_by_third": resident[-1] / resident[min(len(resident) - 1, 2)],
    }


def draw(found: dict[str, Row], path: Path) -> None:
    """Draw both: over rounds on the left, over clients on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    over_rounds, over_clients = figure.subplots(1, 2)
    long, *sizes = found.values()
    if "skipped" not in long:
        over_rounds.plot([b / 2**20 for b in long["resident_bytes"]], label="resident MiB")
        after_first = [1000 * s for s in long["seconds"][1:]]
        over_rounds.plot(range(1, len(after_first) + 1), after_first, label="CPU ms a round")
    sizes = [row for row in sizes if "skipped" not in row]
    for label, heights in (
        ("resident MiB", [max(row["resident_bytes"]) / 2**20 for row in sizes]),
        ("CPU ms a round", [1000 * min(row["seconds"]) for row in sizes]),
    ):
        over_clients.plot([row["num_clients"] for row in sizes], heights, "o-", label=label)
    over_rounds.set(xlabel="round", title="over rounds", ylim=(0, None))
    over_clients.set(xlabel="clients", title="over clients", xlim=(0, None), ylim=(0, None))
    for axes in (over_rounds, over_clients):
        axes.legend()
    figure.savefig(path)
