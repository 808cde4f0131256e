"""What each client gains over training alone: the same client, data, model and seed under Local.

Only a Local run that trained with the same settings says what federation gains; where there is
none, the models that the run itself trained alone (`measure-alone`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.groups import Group, Stat, Study
from experiments.report.runs import Run
from experiments.report.settings import (
    complete_settings,
    data_settings,
    local_command,
    local_settings,
)

LOCAL = "local"


@dataclass(frozen=True)
class ClientGain:
    """One client of one seed: accuracy minus its accuracy alone, a fraction."""

    seed: int
    client_id: str
    family: str
    gain: float


@dataclass(frozen=True)
class GroupGain:
    """All clients of a group whose seeds have a Local run that fits, or measured it themselves.

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
    run: Run
    differs: Mapping[str, tuple[Any, Any]]

    @property
    def why(self) -> str:
        """The reason in words."""
        if not self.differs:
            return "no Local run has the same data, models and seed"
        said = [f"{key} {theirs} instead of {own}" for key, (own, theirs) in self.differs.items()]
        return f"the nearest Local run has {', '.join(said)}"

    @property
    def command(self) -> str:
        """The command that makes the Local run."""
        return local_command(self.run)


def gains_over_local(study: Study) -> tuple[list[GroupGain], list[Unmatched]]:
    """Compare every other group with Local; name the runs that no Local run fits.

    A Local run fits when its data, its clients' models, its seed and whatever decides training
    alone (`experiments.report.settings.local_settings`) are the same; of several the newest is
    taken.
    """
    alone: dict[str, list[Run]] = {}
    runs = [run for group in study.groups if group.method == LOCAL for run in group.counted]
    for run in sorted(runs, key=Run.changed_at, reverse=True):
        alone.setdefault(_identity(run), []).append(run)
    gains: list[GroupGain] = []
    unmatched: list[Unmatched] = []
    for group in study.groups:
        clients: list[ClientGain] = []
        for run in () if group.method == LOCAL else group.counted:
            other, differs = _fitting(run, alone.get(_identity(run), []))
            if other is None and run.gain is None:
                unmatched.append(Unmatched(group.label, run, differs))
            else:
                clients += _client_gains(run, other)
        if mean := _over_seeds(clients):
            families = sorted({client.family for client in clients})
            found = {f: _over_seeds([c for c in clients if c.family == f]) for f in families}
            by_family = {family: stat for family, stat in found.items() if stat}
            gains.append(GroupGain(group, tuple(clients), mean, by_family))
    return gains, unmatched


def missing_runs(unmatched: Sequence[Unmatched]) -> list[list[Unmatched]]:
    """Put those together that want the same Local run but for its seed, for the same reason."""
    found: dict[tuple[str, str], list[Unmatched]] = {}
    for item in sorted(unmatched, key=lambda item: item.run.seed):
        pattern = item.command.replace(f"--seed {item.run.seed}", "--seed")
        found.setdefault((pattern, item.why), []).append(item)
    return [*found.values()]


def _fitting(run: Run, alone: Sequence[Run]) -> tuple[Run | None, dict[str, tuple[Any, Any]]]:
    """Return the Local run that fits a run, or None and how the nearest one differs."""
    wanted = local_settings(run.config)
    differences = []
    for other in alone:
        theirs = local_settings(other.config)
        differs = {k: (v, theirs[k]) for k, v in wanted.items() if v != theirs[k]}
        if not differs:
            return other, {}
        differences.append(differs)
    return None, min(differences, key=len, default={})


def _client_gains(run: Run, local: Run | None) -> list[ClientGain]:
    """Compare with the clients of a Local run, or with what the run measured itself."""
    before = {c.client_id: c.accuracy for c in local.clients} if local else {
        c.client_id: c.alone for c in run.clients if c.alone is not None
    }  # fmt: skip
    families = run.families()
    return [
        ClientGain(run.seed, c.client_id, families[c.client_id], c.accuracy - before[c.client_id])
        for c in run.clients
        if c.client_id in before
    ]


def _over_seeds(clients: Sequence[ClientGain]) -> Stat | None:
    means = (Stat.of(c.gain for c in clients if c.seed == seed)
             for seed in sorted({client.seed for client in clients}))  # fmt: skip
    return Stat.of(mean.mean for mean in means if mean)


def _identity(run: Run) -> str:
    data = sorted(data_settings(run.config).items())
    return repr((data, complete_settings(run.config)["models"], run.seed))
