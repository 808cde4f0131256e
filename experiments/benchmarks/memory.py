"""Point 2 of issue 6: a thousand CNN clients and their server in one process, and its memory.

Real clients that really train (few pictures each), every one of them in flight at once, on the
in-process engine, in a process of its own. Two rounds, for Adam's moments come with the first step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.child import measure_in_child
from experiments.benchmarks.rounds import STEADY, Workload, inprocess
from experiments.benchmarks.timing import peak_bytes

LIMIT_BYTES = 4_000_000_000


def memory(work: Workload) -> dict[str, Any]:
    """Run `work.num_clients` CNN clients in a fresh process; return its peak beside the limit."""
    arguments = [str(work.num_clients), work.data_dir, str(work.folder), str(int(work.quick))]
    row = {"num_clients": work.num_clients, "limit_bytes": LIMIT_BYTES}
    return row | measure_in_child("experiments.benchmarks.memory", arguments)


def measure(work: Workload) -> dict[str, Any]:
    """Run here; return the peak of this process and what its second round took."""
    config = work.config(f"memory-{work.num_clients}", rounds=STEADY, checkpoint_every=STEADY)
    before = peak_bytes()
    row = inprocess(work, config, workers=1)
    return {
        "peak_bytes": peak_bytes(),
        "imports_bytes": before,
        "num_accepted": row["num_accepted"],
        "seconds_round": row["seconds_round"],
        "seconds_server": row["seconds_server"],
        "wire_bytes": row["bytes_up"] + row["bytes_down"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    clients, data, scratch, quick = sys.argv[1:5]
    print(json.dumps(measure(Workload(int(clients), data, Path(scratch), quick == "1"))))
