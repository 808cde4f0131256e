"""What a group's clients hold, kept up to date without its heads.

While trunk and embeddings stand still, theta_i = b + W^T f_i is linear in what W has been moved by,
and the least-squares rule moves W inside the span of P (`server_app.aggregation.least_squares`): a
step

    W -= P^T A,   b += f_mean P^T A     (A: each client's personal change, P = (F F^T + d I)^-1 F)

moves theta_i by - (F P^T A)_i, N products of a client's size instead of 2 H for moving W and
generating from it. So A is summed up, theta is moved itself, and W and b get what they are owed
when somebody reads them: a checkpoint, a new client. It keeps three vectors of a client's size for
each client, so it is for at most H / 2 of them: 1.5 times the heads, where Adam keeps 3 times.
A checkpoint thus has theta generated anew, and rounded otherwise: `checkpoint-every` changes the
last bits of a run.

Shapes: N clients of the group, n updates, C chunks, c chunks of a tile, S chunk size, H hidden.
"""

# ruff: noqa: N803, N806 - names carry their shape as a suffix

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from server_app.aggregation.ridge import ridge_rows
from server_app.hypernet.memory import empty_rows


class Ledger:
    """Theta of all clients of a group, and what the group's heads are owed.

    Parameters
    ----------
    weight, bias
        Of the heads, (C, H, S) and (C, S).
    members
        client_ids, in the order of the features.
    features_CNH
        The trunk's output for them; it must stay what it is while the ledger is open.
    theta_NL
        Theta of all members, padded to L = C S entries. The ledger owns it from now on.
    damping
        d, `kernel-damping`.
    """

    def __init__(
        self,
        heads: tuple[Tensor, Tensor],
        members: Sequence[str],
        features_CNH: Tensor,
        theta_NL: Tensor,
        damping: float,
    ) -> None:
        self.members = list(members)
        self._weight, self._bias = heads
        self._row = {client_id: row for row, client_id in enumerate(members)}
        self._theta_NL = self._next_NL = theta_NL
        self._owed_NCS = torch.zeros(len(members), *self._bias.shape, device=theta_NL.device)
        center_CH = features_CNH.mean(1)
        self._solved_CNH = ridge_rows(features_CNH, range(len(members)), damping)
        across_CHN = self._solved_CNH.transpose(1, 2)
        self._kernel_CNN = (features_CNH - center_CH[:, None]) @ across_CHN
        self._onto_C1N = center_CH[:, None] @ across_CHN

    def holds(self, client_id: str) -> bool:
        """Whether it has this client's theta."""
        return client_id in self._row

    def emit(self, client_ids: Sequence[str], sizes: Sequence[int]) -> list[Tensor]:
        """Return theta_i (P_i,), rows of one block of memory, which no later step changes."""
        rows = [self._row[client_id] for client_id in client_ids]
        return [self._theta_NL[row, :size] for row, size in zip(rows, sizes, strict=True)]

    def sample(self, client_ids: Sequence[str], chunks: Tensor) -> Tensor:
        """Return some chunks of some clients' theta, (c, n, S)."""
        rows = [self._row[client_id] for client_id in client_ids]
        return self._by_chunk(self._theta_NL)[chunks][:, rows]

    @contextmanager
    def step(self) -> Iterator[Self]:
        """Take a step: `share` once for every chunk, and then perhaps `own`."""
        count, length = self._theta_NL.shape
        self._next_NL = empty_rows(count, length, device=self._theta_NL.device)
        try:
            yield self
        except BaseException:  # some chunks moved: only what the heads are owed is still right
            self.members, self._row = [], {}
            raise
        self._theta_NL = self._next_NL

    def share(self, work: slice, change_cS: Tensor, gain: float) -> None:
        """Move everybody's chunks by -gain times a change."""
        self._bias[work].sub_(change_cS, alpha=gain)
        now_cNS, next_cNS = (
            self._by_chunk(self._theta_NL)[work],
            self._by_chunk(self._next_NL)[work],
        )
        torch.sub(now_cNS, change_cS[:, None], alpha=gain, out=next_cNS)

    def own(self, work: slice, rows: Sequence[int], own_cnS: Tensor, gains_n: Tensor) -> None:
        """Move these clients' chunks by their own change times their gain; overwrites it."""
        own_cnS.mul_(gains_n[:, None])
        kernel_cNn = self._kernel_CNN[work][:, :, list(rows)]
        self._by_chunk(self._next_NL)[work].baddbmm_(kernel_cNn, own_cnS, alpha=-1)
        for row, own_cS in zip(rows, own_cnS.unbind(1), strict=True):
            self._owed_NCS[row, work].add_(own_cS)  # index_add_ takes ten times as long

    def _by_chunk(self, theta_NL: Tensor) -> Tensor:
        return theta_NL.view(-1, *self._bias.shape).transpose(0, 1)

    def settle(self) -> None:
        """Give the heads what they are owed."""
        owed_CNS = self._owed_NCS.transpose(0, 1)
        across_CHN = self._solved_CNH.transpose(1, 2)
        for chunk, owed_NS in enumerate(owed_CNS):
            self._weight[chunk].addmm_(across_CHN[chunk], owed_NS, alpha=-1)
            self._bias[chunk] += (self._onto_C1N[chunk] @ owed_NS)[0]
        self._owed_NCS.zero_()


class Heads:
    """Moves weights and biases at once, where the features move as well."""

    def __init__(self, heads: tuple[Tensor, Tensor], features_CNH: Tensor, damping: float) -> None:
        self._weight, self._bias = heads
        self._features_CNH, self._damping = features_CNH, damping
        self._center_CH = features_CNH.mean(1)

    @contextmanager
    def step(self) -> Iterator[Self]:
        """As `Ledger.step`."""
        yield self

    def share(self, work: slice, change_cS: Tensor, gain: float) -> None:
        """As `Ledger.share`."""
        self._bias[work].sub_(change_cS, alpha=gain)

    def own(self, work: slice, rows: Sequence[int], own_cnS: Tensor, gains_n: Tensor) -> None:
        """As `Ledger.own`, by the weight of the heads."""
        solved_cnH = ridge_rows(self._features_CNH[work], rows, self._damping)
        solved_cnH *= gains_n[:, None]
        self._weight[work].baddbmm_(solved_cnH.transpose(1, 2), own_cnS, alpha=-1)
        onto_c1n = torch.bmm(self._center_CH[work, None], solved_cnH.transpose(1, 2))
        self._bias[work].unsqueeze(1).baddbmm_(onto_c1n, own_cnS)
