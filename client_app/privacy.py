"""What a participant has spent of its examples' privacy, kept as long as its state.

The ledger outlives a federation: what left in one is not taken back by joining the next. It is
written before anything leaves, so that no crash forgets a release.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from client_app.store import LEDGER, ClientState
from common.accounting import Spent, delta_for, epsilon, require_accountant
from common.config import TrainingSection
from common.log import logger
from common.messages import TrainReply

if TYPE_CHECKING:
    from client_app.data.examples import ClientData
    from client_app.training.loop import FlatModel, Loss, Trained


@dataclass(frozen=True)
class Privacy:
    """How a participant trains privately, and its ledger.

    `noise` is the multiplier z, `clip` the norm C, `num_examples` those that are protected. `rng`
    replaces the operating system's randomness in tests alone: the server knows the run's seed.
    """

    noise: float
    clip: float
    num_examples: int
    state: ClientState
    rng: np.random.Generator | None = None

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
        """Add steps with a sampling rate to the ledger."""
        spent = Counter({(s.noise, s.rate): s.steps for s in self.spent()})
        spent[self.noise, rate] += steps
        rows = [[*key, count] for key, count in sorted(spent.items())]
        self.state.save(LEDGER, {"spent": torch.tensor(rows, dtype=torch.float64)})

    def spent(self) -> list[Spent]:
        """Return all that was ever spent from this state."""
        kept = self.state.load(LEDGER)
        rows = [] if kept is None else kept["spent"].tolist()
        return [Spent(noise, rate, int(steps)) for noise, rate, steps in rows]

    def epsilon(self) -> float:
        """Return the epsilon of all that was spent, at `delta`."""
        return epsilon(self.spent(), self.delta)

    def train(
        self, model: FlatModel, data: ClientData, section: TrainingSection, loss: Loss | None = None
    ) -> Trained:
        """Train in place by `training.private`; what is spent is in the ledger before it begins."""
        from client_app.training.private import Mechanism, plan, train_privately  # torch.func

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
        return replace(reply, train_loss=None, epsilon=spent)

    def facts(self) -> dict[str, float]:
        """Return what is written beside the personal model."""
        return {"epsilon": self.epsilon(), "delta": self.delta, "dp_noise": self.noise}
