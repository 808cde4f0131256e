"""SGD and AdamW on flat parameters.

Written out because torch.optim imports the whole of torch's compiler on first use: two seconds, in
every process that trains.
"""

from __future__ import annotations

from types import EllipsisType

import torch
from torch import Tensor

from common.config import TrainingSection

BETAS, EPS = (0.9, 0.999), 1e-8
"""As torch.optim.AdamW has them."""


class AdamW:
    """Descends theta (..., P) in place, weight decay decoupled (arXiv 1711.05101).

    Its `state` starts at zero; `rate` may be a scalar on theta's device. Each model of a stack
    counts its own steps: some take fewer.
    """

    def __init__(self, theta: Tensor, section: TrainingSection) -> None:
        self._theta, self._weight_decay = theta.detach(), section.weight_decay
        self.rate: float | Tensor = section.learning_rate
        self._mean, self._square = torch.zeros_like(self._theta), torch.zeros_like(self._theta)
        # float64: 1 - .999 in float32 is wrong in the fifth digit
        shape = (*theta.shape[:-1], 1)
        self._steps = torch.zeros(shape, dtype=torch.float64, device=theta.device)
        self.state = (self._mean, self._square, self._steps)

    @torch.no_grad()
    def step(self, gradient: Tensor, of: slice | EllipsisType = ...) -> None:
        """Descend along a gradient (..., P) with the models `of` a stack, or with all."""
        theta, mean, square = self._theta[of], self._mean[of], self._square[of]
        steps = self._steps[of].add_(1)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = (self.rate / (1 - BETAS[0] ** steps)).float()
        root = (1 - BETAS[1] ** steps).sqrt().float()
        theta.mul_(1 - self.rate * self._weight_decay)
        theta.sub_(mean / square.sqrt().div_(root).add_(EPS) * size)
