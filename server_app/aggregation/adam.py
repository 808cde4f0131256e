"""One server step: deltas -> gradient -> norm clip -> Adam on phi and the embeddings.

With one update this is the published rule exactly (method.md, "One MH-pFedHN round as published"):
vector-Jacobian product at the current phi, global norm clipped, one Adam step. With several it is
the mean of the buffer, still one clip and one Adam step. Parameters that no update of the step
touches (other groups' heads, other clients' embeddings) are not in the optimiser's list during
that step: neither moments nor step counters move.

With `server-rule = "least-squares"` the heads are moved by `server_app.aggregation.least_squares`
instead, and
Adam has trunk and embeddings alone.

Which mean: a head group's gradient is the mean over that group's updates in the buffer; trunk and
embeddings get the mean over the whole buffer, so an embedding's gradient carries its client's share
1/M (Adam is insensitive to that constant; the norm clip sees the gradient of ONE mean loss).
Differs from paper: the mean and the two learning rates (docs/parallel-updates.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.config import UpdateSection
from common.errors import CheckpointError
from server_app.aggregation.diagnostics import StepDiagnostics
from server_app.aggregation.inherit import inherit_moments
from server_app.aggregation.least_squares import GroupBatch, LeastSquares, Pace
from server_app.aggregation.probe import sample_theta, theta_moved
from server_app.hypernet.heads import HeadPullback
from server_app.hypernet.memory import Scratch
from server_app.hypernet.network import Hypernetwork
from server_app.hypernet.pulls import Pull, Pullback, global_norm
from server_app.output.checkpoint import required_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
CLIP_NORM = 50.0
"""A longer gradient is scaled down to this norm before Adam (method.md)."""
FINAL_FRACTION = 0.05
"""Of rates and gains, at the end of their cosine."""


@dataclass(frozen=True)
class ClientUpdate:
    """What one reply brings: delta (P_i,), float32; weights are relative within a step.

    `staleness` counts the server steps between the dispatch and the arrival.
    """

    client_id: str
    delta: Tensor
    weight: float = 1.0
    staleness: int = 0


class ServerUpdate:
    """The optimiser of one hypernetwork.

    `frozen_groups` are the head groups that do not learn; see `freeze`.

    Clients and head groups may be added to the hypernetwork at any time; their Adam state starts
    with the first step that touches them.
    """

    def __init__(
        self, hypernet: Hypernetwork, section: UpdateSection, *, total_rounds: float
    ) -> None:
        self.hypernet = hypernet
        self.section = section
        self.total_rounds = total_rounds
        self.frozen_groups: frozenset[str] = frozenset()
        self._trunk_learns = True
        self._least_squares = LeastSquares(section)
        shared, embeddings = [*hypernet.trunk.parameters()], [nn.Parameter(torch.empty(0))]
        self._adam = torch.optim.Adam(
            [{"params": shared}, {"params": embeddings}],
            fused=True,
        )

    def step(self, updates: Sequence[ClientUpdate], *, progress: float) -> StepDiagnostics:
        """Take one step along the mean of the updates; change phi and the embeddings in place.

        Updates are sorted by client before anything is summed; their weights are normalised.

        Parameters
        ----------
        updates
            At least one. Weight 0 leaves an update out.
        progress
            Rounds done when the step is taken, fractions included; drives the decay.

        Raises
        ------
        RegistrationError
            A client has no embedding.
        ValueError
            No update with a positive weight, or a delta of the wrong size.
        """
        used = _sorted(updates)
        total = sum(update.weight for update in used)
        pulls = [Pull(u.client_id, u.delta, u.weight / total) for u in used]
        return self._descend(pulls, used, progress)

    def step_global(
        self, client_id: str, updates: Sequence[ClientUpdate], *, progress: float
    ) -> StepDiagnostics:
        """Take one step for the global model w_g = h(v_g; phi) (method.md, "MH-pFedHNGD").

        Parameters
        ----------
        client_id
            The owner of v_g in the hypernetwork.
        updates
            delta_g,i of each client, all of w_g's size; weight n_i, the number of examples.
        progress
            As for `step`.

        Raises
        ------
        RegistrationError
            There is no v_g.
        ValueError
            No update with a positive weight, or a delta of the wrong size.
        """
        used = _sorted(updates)
        expected = (self.hypernet.num_parameters(client_id),)
        total = sum(update.weight for update in used)
        mean = torch.zeros(expected, device=self.hypernet.device)
        for update in used:
            if tuple(update.delta.shape) != expected:
                raise ValueError(
                    f"global delta of client {update.client_id!r} has shape "
                    f"{tuple(update.delta.shape)}; the global model has {expected}."
                )
            mean.add_(update.delta.to(mean), alpha=update.weight / total)
        return self._descend([Pull(client_id, mean)], used, progress, is_global=True)

    def freeze(self, groups: Iterable[str]) -> None:
        """Let trunk and these head groups never move again; embeddings and new groups learn."""
        self.frozen_groups = frozenset(groups)
        self._trunk_learns = False

    def learning_rates(self, progress: float) -> tuple[float, float]:
        """Return the rates of (heads and trunk, embeddings) after `progress` rounds.

        Constant, or a cosine from 1 at lr-decay-from (a fraction of all rounds) to FINAL_FRACTION
        at total_rounds.
        """
        factor = self._schedule_factor(progress)
        return self.section.server_lr * factor, self.section.embedding_lr * factor

    def _schedule_factor(self, progress: float) -> float:
        s = self.section
        factor = 1.0
        begin = s.lr_decay_from * self.total_rounds
        span = self.total_rounds - begin
        if s.lr_decay == "cosine" and span > 0:
            done = min(max((progress - begin) / span, 0.0), 1.0)
            cosine = (1 + math.cos(math.pi * done)) / 2
            factor = FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine
        return factor

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the Adam state as `adam.<exp_avg|exp_avg_sq|step>.<parameter>`, and meta.

        The tensors share memory with the live state: write or copy them before the next step.
        """
        self._inherit()
        tensors: dict[str, Tensor] = {}
        names: list[str] = []
        for name, parameter in self.hypernet.named_parameters().items():
            if state := self._adam.state.get(parameter):
                names.append(name)
                tensors |= {f"adam.{part}.{name}": state[part] for part in (*MOMENTS, "step")}
        memory, meta = self._least_squares.state_dict()
        return tensors | memory, {"adam": names} | meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore an exported state; the hypernetwork must have been restored before.

        Raises
        ------
        CheckpointError
            The state has a parameter that the hypernetwork has not, or a tensor is missing.
        """
        self._adam.state.clear()
        parameters = self.hypernet.named_parameters()
        for name in meta["adam"]:
            if name not in parameters:
                raise CheckpointError(
                    f"the checkpoint has Adam moments of {name!r}, which the hypernetwork does not "
                    "have. Load the hypernetwork's state from the same checkpoint first."
                )
            parameter = parameters[name]
            for part in (*MOMENTS, "step"):
                shape = tuple(parameter.shape) if part in MOMENTS else ()
                saved = required_tensor(tensors, f"adam.{part}.{name}", shape)
                self._adam.state[parameter][part] = saved.to(parameter.device, copy=True)
        self._least_squares.load_state_dict(tensors, meta, self.hypernet.groups)

    def _descend(
        self,
        pulls: Sequence[Pull],
        used: Sequence[ClientUpdate],
        progress: float,
        *,
        is_global: bool = False,
    ) -> StepDiagnostics:
        """Gradient, clip, step; skip it when the gradient is not finite."""
        self._inherit()
        moved = [pull.client_id for pull in pulls]
        before = sample_theta(self.hypernet, moved)
        rates = self.learning_rates(progress)
        pace = Pace(self._schedule_factor(progress), self.total_rounds, is_global)
        pullback = self._pull_back(pulls, pace)
        norm = pullback.norm
        scale = min(1.0, CLIP_NORM / (norm + 1e-6))
        applied = math.isfinite(norm)
        if applied:
            self._apply(pullback, scale, rates)
        for parameter in (*pullback.shared, *pullback.embeddings):
            parameter.grad = None
        change, effective_rate = theta_moved(self.hypernet, pulls, before, pullback.rms_delta)
        return StepDiagnostics(
            rms_delta=pullback.rms_delta,
            grad_norm=norm,
            clip_scale=scale,
            learning_rate=rates[0],
            embedding_learning_rate=rates[1],
            gain_factor=pace.factor,
            coherence=pullback.coherence,
            mean_staleness=sum(update.staleness for update in used) / len(used),
            max_staleness=max(update.staleness for update in used),
            num_updates=len(used),
            rms_theta_change=change,
            effective_rate=effective_rate,
            applied=applied,
        )

    def _pull_back(self, pulls: Sequence[Pull], pace: Pace) -> Pullback:
        """Compute the gradient; the least-squares rule moves the heads on the way."""
        if self.section.server_rule == "adam":
            return self._without_frozen(self.hypernet.backward(pulls))

        def move_heads(batch: GroupBatch, scratch: Scratch) -> HeadPullback:
            moves = batch.key not in self.frozen_groups
            return self._least_squares.descend(batch, pace, scratch=scratch, moves=moves)

        if self.section.server_lr == self.section.embedding_lr == 0:
            return self.hypernet.lead(pulls, move_heads)
        return self._without_frozen(self.hypernet.backward(pulls, head_rule=move_heads))

    def _inherit(self) -> None:
        """Hand the state on to head groups that have grown or were split since the last step."""
        heirs = self.hypernet.bank.take_heirs()
        inherit_moments(self._adam, heirs)
        self._least_squares.inherit(heirs)

    def _without_frozen(self, pullback: Pullback) -> Pullback:
        """Leave the frozen parameters out of the gradient, its norm and the step."""
        if self._trunk_learns:
            return pullback
        frozen = set(self.hypernet.trunk.parameters())
        for key in self.frozen_groups:
            frozen |= {self.hypernet.groups[key].weight, self.hypernet.groups[key].bias}
        for parameter in frozen:
            parameter.grad = None
        learning = [p for p in pullback.shared if p not in frozen]
        norm = global_norm([*learning, *pullback.embeddings])
        return replace(pullback, shared=learning, norm=norm)

    def _apply(self, pullback: Pullback, scale: float, rates: tuple[float, float]) -> None:
        """Take one Adam step on the parameters that took part, and on no other."""
        if scale < 1:  # rare: a pass over all gradients, as dear as half of Adam
            for parameter in (*pullback.shared, *pullback.embeddings):
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        lists = (pullback.shared, pullback.embeddings)
        for group, parameters, rate in zip(self._adam.param_groups, lists, rates, strict=True):
            group["params"], group["lr"] = parameters, rate
        if lists[0] or lists[1]:
            self._adam.step()
            self._forget_removed()

    def _forget_removed(self) -> None:
        """Drop the moments of embeddings whose client was removed."""
        living = set(self.hypernet.named_parameters().values())
        for parameter in [p for p in self._adam.state if p not in living]:
            del self._adam.state[parameter]


def _sorted(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Return the updates that count, in an order that does not depend on their arrival."""
    for update in updates:
        if not 0 <= update.weight < math.inf:
            raise ValueError(
                f"the update of client {update.client_id!r} has weight {update.weight}; weights "
                "are finite and not negative."
            )
    used = [update for update in updates if update.weight > 0]
    if not used:
        raise ValueError(
            f"a step needs an update with a positive weight; got {len(updates)} without."
        )
    return sorted(used, key=lambda update: (update.client_id, update.staleness))
