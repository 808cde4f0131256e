"""What each client gains over training alone: the same client, data, model and seed under Local."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.runs import Run
from experiments.settings import complete_settings, data_settings
from experiments.study.groups import Group, Member, Stat, Study

LOCAL = "local"


@dataclass(frozen=True)
class ClientGain:
    """One client of one seed: accuracy minus its accuracy under Local, a fraction."""

    seed: int
    client_id: str
    family: str
    gain: float


@dataclass(frozen=True)
class GroupGain:
    """All clients of a group whose seeds have a Local run.

    `mean` is over seeds of the mean over clients; `by_family` likewise, for each architecture.
    """

    group: Group
    clients: tuple[ClientGain, ...]
    mean: Stat
    by_family: Mapping[str, Stat]
    missing_seeds: tuple[int, ...]

    @property
    def num_better(self) -> int:
        """Clients that do better than alone."""
        return sum(client.gain > 0 for client in self.clients)


def gains_over_local(study: Study) -> list[GroupGain]:
    """Compare every other group with Local; [] where no run of method=local fits any.

    A Local run fits when its data, its clients' models and its seed are the same.
    """
    alone = {
        _identity(member): member
        for group in study.groups
        if group.method == LOCAL
        for member in group.counted
    }
    found = [_compare(group, alone) for group in study.groups if group.method != LOCAL]
    return [gain for gain in found if gain is not None]


def _compare(group: Group, alone: Mapping[str, Member]) -> GroupGain | None:
    clients: list[ClientGain] = []
    missing = []
    for member in group.counted:
        other = alone.get(_identity(member))
        if other is None:
            missing.append(member.seed)
        else:
            clients += _client_gains(member, other.run)
    if not clients:
        return None
    families = sorted({client.family for client in clients})
    by_family = {f: _over_seeds([c for c in clients if c.family == f]) for f in families}
    return GroupGain(group, tuple(clients), _over_seeds(clients), by_family, tuple(missing))


def _client_gains(member: Member, alone: Run) -> list[ClientGain]:
    before = {client.client_id: client.accuracy for client in alone.clients}
    families = member.run.families()
    return [
        ClientGain(
            member.seed, c.client_id, families[c.client_id], c.accuracy - before[c.client_id]
        )
        for c in member.run.clients
        if c.client_id in before
    ]


def _over_seeds(clients: Sequence[ClientGain]) -> Stat:
    seeds = sorted({client.seed for client in clients})
    means = [Stat.of(c.gain for c in clients if c.seed == seed) for seed in seeds]
    stat = Stat.of(mean.mean for mean in means if mean is not None)
    if stat is None:
        raise ValueError("no client, no gain")  # callers have at least one
    return stat


def _identity(member: Member) -> str:
    full: Mapping[str, Any] = complete_settings(member.run.config)
    return repr((sorted(data_settings(full).items()), full["models"], member.seed))
