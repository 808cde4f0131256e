"""What server steps did, in plain numbers, and what of it a round's row in metrics.jsonl says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class StepDiagnostics:
    """What one server step did, in plain numbers.

    Attributes
    ----------
    rms_delta, coherence : of the deltas; see `server_app.hypernet.pulls.Pullback`.
    grad_norm : global norm before the clip.
    clip_scale : factor the clip put on the gradient, at most 1.
    learning_rate, embedding_learning_rate : after warm-up and decay.
    gain_factor : of both rates and of the gains of "least-squares", by warm-up and decay.
    mean_staleness, max_staleness : over the updates of the step.
    num_updates : how many deltas went in.
    effective_rate : how far the step moved theta, as a multiple of how far the deltas reach in the
        same places (`theta_moved`): 1 where theta goes exactly as far as the clients' training.
    rms_theta_change : effective_rate times rms_delta.
    applied : False when the gradient was not finite and the step was skipped.
    """

    rms_delta: float
    grad_norm: float
    clip_scale: float
    learning_rate: float
    embedding_learning_rate: float
    gain_factor: float
    coherence: float
    mean_staleness: float
    max_staleness: int
    num_updates: int
    rms_theta_change: float = 0.0
    effective_rate: float = 0.0
    applied: bool = True


def mean_diagnostics(steps: Sequence[StepDiagnostics]) -> dict[str, float]:
    """Average the diagnostics of a round's server steps; of max_staleness take the largest."""
    if not steps:
        return {}
    rows = [vars(step) for step in steps]
    means = {key: fmean(float(row[key]) for row in rows) for key in rows[0]}
    return means | {"max_staleness": float(max(step.max_staleness for step in steps))}


def global_diagnostics(step: StepDiagnostics | None) -> dict[str, float]:
    """Name the diagnostics of w_g's own step, where there was one."""
    keys = ("rms_delta", "rms_theta_change", "effective_rate", "num_updates")
    return {} if step is None else {f"global_{key}": float(getattr(step, key)) for key in keys}
