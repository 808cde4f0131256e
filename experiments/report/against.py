"""Every group against one of them, participant by participant: what it gains, and how surely."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from common.errors import ConfigError, unknown_name
from experiments.report.groups import Group, Study
from experiments.report.tables import NONE, Column

RESAMPLES, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Difference:
    """Accuracy minus the other group's, in points, over participants that both have.

    `low` to `high` is the bootstrap's interval of the mean at 95 % (percentiles; participants are
    drawn anew, those of all seeds together).
    """

    mean: float
    low: float
    high: float
    num_better: int
    count: int

    @classmethod
    def between(cls, group: Group, other: Group) -> Difference | None:
        """Pair the clients of equal seed and name; None where there are none."""
        theirs = _by_client(other)
        points = [100 * (x - theirs[who]) for who, x in _by_client(group).items() if who in theirs]
        if not points or group is other:
            return None
        gains = np.array(points)
        rng = np.random.default_rng(0)
        means = rng.choice(gains, (RESAMPLES, len(gains))).mean(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        mean = float(gains.mean())
        return cls(mean, float(low), float(high), int((gains > 0).sum()), len(gains))


def columns_against(study: Study, name: str) -> list[Column]:
    """Return the columns that hold every group against the one of this name.

    Raises ConfigError where there is none.
    """
    named = {group.label: group for group in study.groups}
    if name not in named:
        raise ConfigError(unknown_name("group", name, named))
    other = named[name]
    where = f"over participants of equal seed and name, against {name}"
    return [
        Column(f"over {name}", f"mean gain {where}, points, 95 % by bootstrap",
               partial(_gain, other)),
        Column("gain", f"participants that gain, {where}", partial(_better, other)),
    ]  # fmt: skip


def _gain(other: Group, group: Group) -> str:
    found = Difference.between(group, other)
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]" if found else NONE


def _better(other: Group, group: Group) -> str:
    found = Difference.between(group, other)
    return f"{found.num_better} of {found.count}" if found else NONE


def _by_client(group: Group) -> dict[tuple[int, str], float]:
    return {(run.seed, c.client_id): c.accuracy for run in group.counted for c in run.clients}
