"""What each client gains over training alone: the same client, data, model and seed under Local.

Only a Local run that trained with the same settings says what federation gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.groups import Group, Member, Stat, Study, changed_at
from experiments.report.runs import Run
from experiments.report.settings import complete_settings, data_settings, local_settings

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
    """All clients of a group whose seeds have a Local run that fits.

    `mean` is over seeds of the mean over clients; `by_family` likewise, for each architecture.
    """

    group: Group
    clients: tuple[ClientGain, ...]
    mean: Stat
    by_family: Mapping[str, Stat]

    @property
    def num_better(self) -> int:
        """Clients that do better than alone."""
        return sum(client.gain > 0 for client in self.clients)


@dataclass(frozen=True)
class Unmatched:
    """A run without the Local run that it could be compared with.

    `differs` holds what the nearest Local run has otherwise, as {key: (wanted, that one's)}; it is
    empty where there is none with the same data, models and seed.
    """

    label: str
    member: Member
    differs: Mapping[str, tuple[Any, Any]]


def gains_over_local(study: Study) -> tuple[list[GroupGain], list[Unmatched]]:
    """Compare every other group with Local; name the runs that no Local run fits.

    A Local run fits when its data, its clients' models, its seed and whatever decides training
    alone (`experiments.report.settings.local_settings`) are the same; of several the newest is
    taken.
    """
    alone = _local_runs(study)
    gains: list[GroupGain] = []
    unmatched: list[Unmatched] = []
    for group in study.groups:
        if group.method == LOCAL:
            continue
        clients: list[ClientGain] = []
        for member in group.counted:
            other, differs = _fitting(member, alone.get(_identity(member), []))
            if other is None:
                unmatched.append(Unmatched(group.label, member, differs))
            else:
                clients += _client_gains(member, other.run)
        if clients:
            gains.append(_summed_up(group, clients))
    return gains, unmatched


def _local_runs(study: Study) -> dict[str, list[Member]]:
    """Return the completed runs of Local by data, models and seed, the newest first."""
    found: dict[str, list[Member]] = {}
    members = [m for group in study.groups if group.method == LOCAL for m in group.counted]
    for member in sorted(members, key=lambda m: changed_at(m.run), reverse=True):
        found.setdefault(_identity(member), []).append(member)
    return found


def _fitting(
    member: Member, alone: Sequence[Member]
) -> tuple[Member | None, dict[str, tuple[Any, Any]]]:
    """Return the Local run that fits a run, or None and how the nearest one differs."""
    wanted = local_settings(member.run.config)
    nearest: dict[str, tuple[Any, Any]] = {}
    for other in alone:
        theirs = local_settings(other.run.config)
        differs = {k: (v, theirs[k]) for k, v in wanted.items() if v != theirs[k]}
        if not differs:
            return other, {}
        nearest = differs if not nearest or len(differs) < len(nearest) else nearest
    return None, nearest


def _summed_up(group: Group, clients: Sequence[ClientGain]) -> GroupGain:
    families = sorted({client.family for client in clients})
    by_family = {f: _over_seeds([c for c in clients if c.family == f]) for f in families}
    return GroupGain(group, tuple(clients), _over_seeds(clients), by_family)


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
