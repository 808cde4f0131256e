"""One that makes all others look alike to the server, so that what is personal is averaged away."""

from collections.abc import Callable

import numpy as np
import pytest

from common.config import RunConfig
from experiments.attacks.liars import LIES
from server_app.clients import Client
from server_app.methods.base import Upload
from server_app.methods.mhpfedhn import Deltas, MHpFedHN

SIZE, HONEST, NORM = 4_000, 10, 9_000.0
EVERYBODY = [Client(f"site-{i:02}", SIZE, 100) for i in range(HONEST + 1)]


def seen_in_one_number(method: MHpFedHN) -> np.ndarray:
    group = method.hypernet.groups[method.hypernet.group_key("site-00")]
    return LIES["alike"](np.zeros(SIZE, np.float32), [], group)


def along_the_last_entries(_: MHpFedHN) -> np.ndarray:
    delta = np.zeros(SIZE)
    delta[-1000:] = np.random.default_rng(3).normal(size=1000)
    return delta


@pytest.mark.parametrize("together", [HONEST + 1, 5, 1])
@pytest.mark.parametrize("lie", [seen_in_one_number, along_the_last_entries])
def test_honest_ones_stay_unlike_where_they_are(
    lie: Callable[[MHpFedHN], np.ndarray], together: int
) -> None:
    """Each goes to an optimum of its own, all at once, in cohorts, or one after the other."""
    method = MHpFedHN(MHpFedHN.adapted(RunConfig.parse({"method": "mh-pfedhn"})))
    for one in EVERYBODY:
        method.add_client(one)
    rng, names = np.random.default_rng(0), [one.client_id for one in EVERYBODY]
    optima = rng.normal(0, 0.05, SIZE) + rng.normal(0, 0.05, (HONEST + 1, SIZE))
    false = lie(method)
    for step in range(6 * len(EVERYBODY) // together):
        uploads = []
        for i in ((step * together + k) % len(EVERYBODY) for k in range(together)):
            ((_, theta),) = method.hypernet.thetas([names[i]])
            delta = 0.3 * (theta - optima[i]) + rng.normal(0, 0.005, SIZE)
            if i == HONEST:
                delta = false * NORM / np.linalg.norm(false)
            uploads.append(Upload(EVERYBODY[i], 100, Deltas(delta.astype(np.float32))))
        method.learn(uploads, server_round=step + 1, progress=float(step))
    members, weights = method.hypernet.kernel(method.hypernet.group_key(names[0]), names)
    own = [float(weights[i, members.index(name)]) for i, name in enumerate(names[:HONEST])]
    assert min(own) > 0.8
