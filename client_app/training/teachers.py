"""What the clients of a cohort learn from beside the labels: everybody's own teacher, at once.

Shapes: G clients, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from client_app.training.loop import distilled


@dataclass(frozen=True)
class Teachers:
    """Teachers of one architecture, that of `module`, and their weights `alphas` (G,).

    `state` has their parameters and buffers by name, each with a leading G, or 1 where all learn
    from one.
    """

    module: nn.Module
    state: dict[str, Tensor]
    alphas: Tensor
    temperature: float

    def of(self, clients: Sequence[int] | slice) -> Teachers:
        """Return the teachers of some of the clients, in their order."""
        state = {k: x if len(x) == 1 else x[clients] for k, x in self.state.items()}
        return replace(self, state=state, alphas=self.alphas[clients])

    def losses(self, images: Tensor, logits: Tensor, labels: Tensor, hard: Tensor) -> Tensor:
        """Return the loss of every example (G, B).

        Images are (G, B, ...), logits (G, B, C), and `hard` (G, B) is the loss of the labels, all
        of which are of one kind.
        """
        self.module.eval()
        if all(len(x) == 1 for x in self.state.values()):
            images = images.flatten(0, 1)[None]
        with torch.no_grad():
            teacher = vmap(self._logits)(self.state, images).reshape(logits.shape)
        alpha = self.alphas[:, None]
        return distilled(logits, teacher, labels, hard, alpha=alpha, temperature=self.temperature)

    def _logits(self, state: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.module, state, (images,))
        return logits
