"""What a participant has spent of its examples' privacy, kept as long as its state.

The ledger outlives a federation: what left in one is not taken back by joining the next. It is
written before anything leaves, so that no crash forgets a release. A round without noise is in it
as well, and there is no epsilon after one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from client_app.store import LEDGER, ClientState, FolderState
from common.accounting import Spent, delta_for, epsilon, require_accountant
from common.config import TrainingSection
from common.errors import ConfigError
from common.files import PRIVATE, sync
from common.log import logger
from common.messages import TrainReply

if TYPE_CHECKING:
    from client_app.data.examples import ClientData
    from client_app.models.instances import FlatModel
    from client_app.training.loop import Loss, Trained


LOCK_TIMEOUT_S = 60.0
MOST_ROWS = 12
"""Of a ledger: pairs of noise and rate; those that are most alike are counted as the worse one."""


@dataclass(frozen=True)
class Privacy:
    """How a participant trains privately, and its ledger.

    `noise` is the multiplier z, `clip` the norm C, `num_examples` those that are trained on; `most`
    is the largest epsilon, 0: any. A participant is `single` where no other one's state lies beside
    its own. `rng` replaces the operating system's randomness in tests alone: the server knows the
    run's seed.
    """

    noise: float
    clip: float
    num_examples: int
    state: ClientState
    most: float = 0.0
    rng: np.random.Generator | None = None
    single: bool = False

    @property
    def delta(self) -> float:
        """The probability with which the bound may fail."""
        return delta_for(self.num_examples)

    def generator(self) -> np.random.Generator:
        """Make what samples and draws noise: 128 bits of the operating system's entropy.

        Not torch's: its generator on the CPU takes 32 bits of a seed, which can be searched.
        """
        return self.rng or np.random.default_rng()

    def spend(self, rate: float, steps: int) -> None:
        """Add steps with a sampling rate to the ledger.

        Raises ConfigError, and spends nothing, where that were more than `most`, or the ledger of
        these examples may be another's.
        """
        if self.single:
            _require_no_other(self.state)
        with _locked(self.state):
            after = [*spent_from(self.state), Spent(self.noise, rate, steps)]
            wanted = epsilon(after, self.delta)  # before it is written: it must be computable
            if self.most and wanted > self.most:
                raise ConfigError(
                    f"this round would spend epsilon {wanted:.2f}; this participant's own file "
                    f"allows max-epsilon = {self.most:g}. It trains no more with these examples."
                )
            _write(self.state, after)

    def epsilon(self) -> float:
        """Return the epsilon of all that was spent, at `delta`."""
        return epsilon(spent_from(self.state), self.delta)

    def train(
        self,
        model: FlatModel,
        data: ClientData,
        section: TrainingSection,
        loss: Loss | None = None,
        *,
        leaves: bool = True,
    ) -> Trained:
        """Train in place by `training.private`; what is spent is in the ledger before it begins.

        Where nothing of the model ever leaves the participant, nothing is spent.
        """
        from client_app.training.private import Mechanism, plan, train_privately  # torch.func

        if leaves:
            self.spend(*plan(section, data.num_train))
        mechanism = Mechanism(self.noise, self.clip, self.generator())
        return train_privately(model, data, section, mechanism, loss=loss)

    def require_fit(self, module: nn.Module) -> None:
        """Raise ModelError where a model cannot be trained privately, or Opacus is missing."""
        from client_app.training.private import require_private

        require_private(module)
        require_accountant()

    def stated(self, reply: TrainReply, who: str) -> TrainReply:
        """Replace a reply's loss by the epsilon that all of this state's training has spent."""
        spent = self.epsilon()
        logger.info("%s has spent epsilon %.2f at delta %.0e", who, spent, self.delta)
        if spent == math.inf:
            logger.warning(
                "%s has no bound: its ledger holds rounds without noise. Only other examples, with "
                "a new state-dir, have one.",
                who,
            )
        return replace(reply, train_loss=None, epsilon=spent)

    def facts(self) -> dict[str, float | None]:
        """Return what is written beside the personal model; no epsilon where there is no bound."""
        spent = self.epsilon()
        bound = None if spent == math.inf else spent
        return {"epsilon": bound, "delta": self.delta, "dp_noise": self.noise}


def spent_from(state: ClientState) -> list[Spent]:
    """Return all that was ever spent from a state; raise ConfigError where it cannot be read."""
    kept = state.load(LEDGER)
    rows = [] if kept is None else kept["spent"].tolist()
    return [Spent(noise, rate, int(steps)) for noise, rate, steps in rows]


def _require_no_other(state: ClientState) -> None:
    """Raise ConfigError where nothing was spent under this name, but something under another."""
    if not isinstance(state, FolderState) or state.load(LEDGER) is not None:
        return
    own = state.folder
    for path in sorted(own.parent.glob(f"*/{LEDGER}.safetensors")):
        if path.parent != own:
            raise ConfigError(
                f"there is a ledger of {path.parent.name}, and none of {own.name}, below the "
                "state-dir. Are these the same examples under another client-id, move "
                f"{path.name} from that folder to this one: what was spent stays spent. Are they "
                "others, set another state-dir."
            )


def note_clear(state: ClientState) -> None:
    """Write into a participant's ledger, once, that something leaves it without noise."""
    if any(not part.noise for part in spent_from(state)):
        return
    with _locked(state):
        _write(state, [*spent_from(state), Spent(0.0, 1.0, 1)])


@contextmanager
def _locked(state: ClientState) -> Iterator[None]:
    """Keep others from spending meanwhile: a server can send two messages at once."""
    if not isinstance(state, FolderState):
        yield
        return
    lock = FileLock(state.folder / "ledger.lock", mode=PRIVATE, timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"the ledger has been held for {LOCK_TIMEOUT_S:g} s by another message of this "
            "participant; this one is refused, for what it spends could not be written."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _ratio(pair: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """Order pairs of noise and rate by how much merging them costs; a clear one is never merged."""
    (a, rate_a), (b, rate_b) = pair
    return math.inf if not a else b / a * max(rate_a, rate_b) / min(rate_a, rate_b)


def _write(state: ClientState, spent: list[Spent]) -> None:
    steps: Counter[tuple[float, float]] = Counter()
    for part in spent:
        steps[part.noise, part.rate] += part.steps
    while len(steps) > MOST_ROWS:
        (a, b), *_ = sorted(zip(kinds := sorted(steps), kinds[1:], strict=False), key=_ratio)
        worse = (a[0], max(a[1], b[1]))  # less noise, more examples: what both cost at most
        steps[worse] = steps.pop(a) + steps.pop(b)
    rows = [[*key, count] for key, count in sorted(steps.items())]
    state.save(LEDGER, {"spent": torch.tensor(rows, dtype=torch.float64)})
    if isinstance(state, FolderState):
        sync(state.folder)
