"""Twenty participants, hundreds of rounds, one killed every ten: no round lost, memory flat.

``MH_PFEDHN_SOAK_ROUNDS`` sets how many rounds; 200 take an hour on two cores.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
import pytest

from tests.deployment.test_loopback import deployed_config
from tests.support.deployment import Deployment
from tests.support.tiny import HERE

ROUNDS = int(os.environ.get("MH_PFEDHN_SOAK_ROUNDS", "200"))
SITES = [f"site-{number:02}" for number in range(20)]
KILLED_EVERY = 10


def start_site(deployment: Deployment, site: str) -> None:
    number = SITES.index(site)
    model = f"{HERE}:{('small', 'wide', 'normed')[number % 3]}"
    deployment.start_site(site, model=model, partition_id=number, num_partitions=len(SITES))


def resident(deployment: Deployment, name: str) -> float:
    """Return the MB that a process and all it started hold."""
    family = [psutil.Process(deployment.processes[name].pid), *deployment.started_by(name)]
    total = 0
    for process in family:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 1e6


@pytest.mark.slow
def test_rounds_go_on_and_memory_stays(tmp_path: Path) -> None:
    config = deployed_config(
        tmp_path, rounds=ROUNDS, min_clients=len(SITES), min_fraction=0.5, message_timeout_s=60.0,
        checkpoint_every=10, keep_checkpoints=1,
    )  # fmt: skip
    megabytes: dict[str, list[float]] = {"superlink": [], "server": [], SITES[0]: []}
    with Deployment(tmp_path, SITES) as deployment:
        deployment.start_superlink()
        deployment.start_server()
        for site in SITES:
            deployment.register(site)
            start_site(deployment, site)
        deployment.run(config)
        returning: list[threading.Thread] = []
        for number in range(1, ROUNDS + 1):
            deployment.wait_for_round(config, number, seconds=600)
            for name, found in megabytes.items():
                found.append(resident(deployment, name))
            if number % KILLED_EVERY == 0 and number < ROUNDS:
                victim = SITES[1 + number // KILLED_EVERY % (len(SITES) - 1)]
                deployment.kill(victim)
                returning.append(threading.Thread(target=restart, args=(deployment, victim)))
                returning[-1].start()
        for thread in returning:
            thread.join()
        assert deployment.wait_for_status(config, {"completed", "failed"}) == "completed"
    rows = deployment.rows(config)
    accepted = [int(row["num_accepted"]) for row in rows]
    print(f"accepted by round {accepted}; seconds {[round(r['seconds_round']) for r in rows]}")
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert min(accepted) >= len(SITES) - 2
    for name, found in megabytes.items():
        quarters = found[ROUNDS // 4 : ROUNDS // 2], found[-ROUNDS // 4 :]
        early, late = map(median, quarters)
        print(f"{name}: {early:.0f} MB in the second quarter, {late:.0f} MB in the last")
        assert late < 1.1 * early + 5


def restart(deployment: Deployment, site: str) -> None:
    """Bring a killed site back, as often as it takes: its old connection has to be given up."""
    while True:
        start_site(deployment, site)
        time.sleep(10)
        if deployment.processes[site].poll() is None:
            return
        deployment.processes.pop(site)
