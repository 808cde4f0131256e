"""Error feedback: what of a delta was not sent is added to the next one.

Top-k sparsification loses nothing in the long run this way: an entry that is small in every round
but always of one sign grows in the client's memory until it is among the largest and goes up
(Stich et al., Sparsified SGD with memory, 2018, algorithm 1; Seide et al. 2014 for the idea). The
memory also takes the rounding of the wire's precision.

A delta that the server refuses, or that comes too late, is lost as a dense one would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from client_app.store import ClientState, Stamp
from common.compression import Float32, Precision, indices_of_largest, num_kept, rounded

VALUES = "values"


@dataclass(frozen=True)
class Memory:
    """Where a client keeps what it left out of one kind of delta.

    Versions are stamped with their round like BatchNorm buffers, so that a server which resumes
    from a checkpoint finds the memory of that time. One version is as large as the model.
    """

    state: ClientState
    name: str
    stamp: Stamp

    def recall(self, length: int) -> Float32:
        """Return what earlier rounds left out (P,); zeros at first and after a change of model."""
        kept = self.state.load(self.name, before=self.stamp.server_round)
        if kept is None or kept[VALUES].shape != (length,):
            return np.zeros(length, dtype=np.float32)
        values: Float32 = kept[VALUES].numpy()
        return values

    def keep(self, left_out: Float32) -> None:
        """Keep what this round leaves out (P,)."""
        self.state.save(self.name, {VALUES: torch.from_numpy(left_out)}, stamp=self.stamp)


def largest_with_memory(
    delta: Float32, memory: Memory, *, top_k: float, precision: Precision
) -> Float32:
    """Return the largest entries of delta + memory (P,), 0 elsewhere; the memory keeps the rest.

    Parameters
    ----------
    delta : (P,), all of this round's change; it is not changed.
    top_k : fraction of the entries that is sent, above 0; see `common.compression.num_kept`.
    precision : in which the entries travel; what is returned is rounded to it.

    Returns
    -------
    (P,) float32 exactly as the server will have it, with at most `num_kept(P, top_k)` entries
    that are not 0.
    """
    wanted = delta + memory.recall(delta.size)
    sent, count = np.zeros_like(wanted), num_kept(delta.size, top_k)
    finite = np.isfinite(wanted)
    if not finite.all():  # the server refuses it and says why; the memory stays as it was
        bad = np.flatnonzero(~finite)[:count]
        sent[bad] = wanted[bad]
        return sent
    indices = indices_of_largest(wanted, count)
    values = rounded(wanted[indices], precision)
    while not values.all():  # zeros are not sent, and float16 scales blocks of what is
        indices = indices[values != 0]
        values = rounded(wanted[indices], precision)
    sent[indices] = values
    if np.isfinite(values).all():  # rounding may overflow; what is kept would be lost for good
        memory.keep(wanted - sent)
    return sent
