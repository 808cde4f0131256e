"""Straggler: what a client that is ten times slower than the rest costs the others.

The real ServerApp and ClientApp run on idle models, every client answering after a fixed time: once
with equal clients, once with one that takes ten times as long. The clients sleep, so fifty of them
are fifty machines.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import mean

from flwr.app import Context, Message

from client_app.app import app as client_app
from experiments.benchmarks.measuring import Row
from experiments.benchmarks.rounds import Workload
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes

SCHEDULES = {"waits for all": 1.0, "closes at 90 %": 0.9}
"""By name, the fraction of the clients whose replies close a round."""


class Paced:
    """The real ClientApp, whose training replies take a time of their own."""

    def __init__(self, usual_s: float, slow_s: float) -> None:
        self._usual_s, self._slow_s = usual_s, slow_s

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message; a training takes at least this client's time."""
        due = time.monotonic()
        if message.metadata.message_type.startswith("train"):
            due += self._slow_s if context.node_config["partition-id"] == 0 else self._usual_s
        reply: Message = client_app(message, context)
        time.sleep(max(0.0, due - time.monotonic()))
        return reply


def straggler_part(work: Workload, *, rounds: int, usual_s: float) -> Row:
    """Measure every schedule with and without a slow client; the growth is a fraction."""
    rows: dict[str, Row] = {}
    for name, close_fraction in SCHEDULES.items():
        equal, slow = (
            seconds_per_round(work, Paced(usual_s, slow_s), close_fraction, rounds)
            for slow_s in (usual_s, 10 * usual_s)
        )
        rows[name] = {"equal_seconds": equal, "slow_seconds": slow, "growth": slow / equal - 1}
    return {"rows": rows}


def seconds_per_round(work: Workload, app: Paced, close_fraction: float, rounds: int) -> float:
    """Run a federation; return the mean seconds of a round.

    Without the first (start-up) and the last, which waits for everybody's final model.
    """
    schedule = {"buffer_size": 10, "close_fraction": close_fraction, "rounds": rounds}
    config = work.idle("straggler", **schedule, checkpoint_every=rounds)
    shutil.rmtree(config.run.output_dir, ignore_errors=True)
    run_inprocess(
        config,
        simulated_nodes(work.num_clients),
        workers=work.num_clients + 1,
        client_app=app,  # type: ignore[arg-type]
    )
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return mean(float(json.loads(line)["seconds_round"]) for line in lines[1:-1])
