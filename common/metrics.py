"""Metric rows: weighted means and per-client summaries.

Accuracies are fractions in [0, 1]; losses are means of natural-log cross-entropy per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev

from common.messages import Evaluation


def weighted_mean(pairs: Iterable[tuple[float, float]]) -> float:
    """Return sum(w x) / sum(w) over (w, x) pairs; NaN when there is no weight."""
    pairs = list(pairs)
    total = math.fsum(w for w, _ in pairs)
    return math.fsum(w * x for w, x in pairs) / total if total else math.nan


def accuracy(evaluation: Evaluation) -> float:
    """Return the fraction of a client's test examples that it classifies correctly."""
    return evaluation.num_correct / evaluation.num_test


def summarise(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Summarise one evaluation of the federation.

    Returns
    -------
    accuracy_micro: sum of correct over sum of examples (the paper's metric); accuracy_macro: mean
    over clients; accuracy_std: population standard deviation over clients; accuracy_worst10: mean
    of the worst tenth of clients (at least one); test_loss: mean over examples; accuracy_micro_x
    for a further predictor x. Empty: {}.
    """
    if not evaluations:
        return {}
    rows = [evaluations[client_id] for client_id in sorted(evaluations)]
    accuracies = sorted(accuracy(row) for row in rows)
    worst = accuracies[: max(1, math.ceil(0.1 * len(accuracies)))]
    num_test = sum(row.num_test for row in rows)
    others = {name: sum(row.others.get(name, 0) for row in rows) for name in rows[0].others}
    return {
        "accuracy_micro": sum(row.num_correct for row in rows) / num_test,
        "accuracy_macro": fmean(accuracies),
        "accuracy_std": pstdev(accuracies),
        "accuracy_worst10": fmean(worst),
        "test_loss": weighted_mean((r.num_test, r.test_loss) for r in rows),
        **{f"accuracy_micro_{name}": count / num_test for name, count in others.items()},
    }
