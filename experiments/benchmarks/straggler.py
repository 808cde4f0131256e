"""What a client that is ten times slower than the rest costs the others.

`python -m experiments.benchmarks.straggler [--clients 50] [--rounds 8]` runs the real ServerApp and
ClientApp twice on idle models, every client answering after a fixed time: once with equal clients,
once with one that takes ten times as long. The clients sleep, so fifty of them are fifty machines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from flwr.app import Context, Message, RecordDict

from client_app.app import app as client_app
from common.config import RunConfig
from common.wire import TRAIN_PERSONAL
from experiments.benchmarks.rounds import HERE
from experiments.run.engines.inprocess import InProcessGrid, make_contexts, simulated_nodes
from server_app.app import app as server_app

SCHEDULES = {"waits for all": 1.0, "closes at 90 %": 0.9}
"""By name, the fraction of the clients whose answers close a round."""


class Paced:
    """The real ClientApp, whose training answers come after a time of their own."""

    def __init__(self, usual_s: float, slow_s: float) -> None:
        self._usual_s, self._slow_s = usual_s, slow_s

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message; a training takes at least this client's time."""
        due = time.monotonic()
        if message.metadata.message_type == TRAIN_PERSONAL:
            due += self._slow_s if context.node_config["partition-id"] == 0 else self._usual_s
        reply: Message = client_app(message, context)
        time.sleep(max(0.0, due - time.monotonic()))
        return reply


def seconds_per_round(app: Paced, close_fraction: float, *, clients: int, rounds: int) -> float:
    """Run a federation; return the mean seconds of a round.

    Without the first (start-up) and the last, which waits for everybody's final model.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.parse(
            {
                "models": f"{HERE}:idle_model",
                "dataset": f"{HERE}:few_pictures",
                "partition": "iid",
                "rounds": rounds,
                "num-partitions": clients,
                "min-client-examples": 2,
                "max-in-flight": 0,
                "buffer-size": 10,
                "hidden-dim": 64,
                "server-rule": "least-squares",
                "head-init": "shared",
                "embedding-std": 1.0,
                "evaluation": "fused",
                "close-fraction": close_fraction,
                "checkpoint-every": rounds,
                "cache-dir": str(Path(folder) / "cache"),
                "output-dir": str(Path(folder) / "run"),
            }
        )
        grid = InProcessGrid(app, make_contexts(config, simulated_nodes(clients)), clients + 1)  # type: ignore[arg-type]
        try:
            server_app(grid, Context(1, 1, {}, RecordDict(), dict(config.flat())))
        finally:
            grid.close()
        rows = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return mean(float(json.loads(row)["seconds_round"]) for row in rows[1:-1])


def measure(*, clients: int, rounds: int, usual_s: float) -> dict[str, Any]:
    """Measure every schedule with and without the slow client; the growth is a fraction."""
    result: dict[str, Any] = {"clients": clients, "usual_s": usual_s, "slow_s": 10 * usual_s}
    for name, close_fraction in SCHEDULES.items():
        equal, slow = (
            seconds_per_round(Paced(usual_s, s), close_fraction, clients=clients, rounds=rounds)
            for s in (usual_s, 10 * usual_s)
        )
        result[name] = {"equal_s": equal, "one_slow_s": slow, "growth": slow / equal - 1}
    return result


def main() -> None:
    """Print a table and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--usual-s", type=float, default=4.0)
    asked = parser.parse_args()
    found = measure(clients=asked.clients, rounds=asked.rounds, usual_s=asked.usual_s)
    for name in SCHEDULES:
        row = found[name]
        print(
            f"{name:>15}: {row['equal_s']:.2f} s a round, with one slow client "
            f"{row['one_slow_s']:.2f} s ({row['growth']:+.0%}; asked: below +15 %)"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
