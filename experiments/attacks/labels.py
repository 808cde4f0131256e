"""The label distribution of a participant, from the last layer's delta.

With cross-entropy the gradient of a class's bias is the mean of p_c - y_c: a class that a client
has many of moves its row and bias up, one that it has not moves them down. The server knows the
weights that it sent, too, and these carry what earlier rounds told.

- closed form: the frequencies are what is left of the mean probabilities (those of the other
  clients' labels) after the bias's delta, by the rate and the number of steps;
- colluding clients: least squares from the same few numbers of each class to its frequency,
  learned from clients whose labels the attacker knows: all but the victim.

Shapes: C classes, D size of the last feature, F numbers of a class.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from client_app.methods.features import head_of
from experiments.attacks.federation import OWN, Answer, Federation, histogram, mean_of


def attack(federation: Federation, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the mean L1 distance to the true frequencies, 0 to 2, of every guess."""
    everybody = federation.clients()
    if len(everybody) < 3:
        raise ValueError("labels: needs three clients or more, to learn from all but the victim.")
    truth = {c: histogram(federation.participant(c).data) for c in everybody}
    features: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    for client_id in everybody:
        answer = federation.answer(client_id)
        features[client_id], moved[client_id] = numbers(federation, client_id, answer)
    errors: dict[str, list[float]] = {}
    for victim in everybody[: args.clients]:
        others = [c for c in everybody if c != victim]
        mean = torch.stack([truth[c] for c in others]).mean(0)
        guesses = {
            "mean of the others": mean,
            "closed form": simplex(mean - moved[victim]),
            "colluding clients": simplex(features[victim] @ learned(features, truth, others)),
        }
        for name, guess in guesses.items():
            errors.setdefault(name, []).append(float((guess - truth[victim]).abs().sum()))
    return [{"guess": name, "l1_error": mean_of(found)} for name, found in errors.items()]


def numbers(federation: Federation, client_id: str, answer: Answer) -> tuple[Tensor, Tensor]:
    """Return what the attacker reads of each class (C, F), and the bias's summed gradient (C,)."""
    model = federation.model(client_id, OWN, answer.sent[OWN])
    num_classes = federation.participant(client_id).data.num_classes
    head = head_of(model.module, num_classes)
    sent, delta = (x[head.span].double() for x in (answer.sent[OWN], answer.delta[OWN]))
    weights = delta[:-num_classes].view(num_classes, -1)
    bias = delta[-num_classes:]
    t, n = federation.config.training, federation.registry.client(client_id).num_examples
    rate = federation.participant(client_id).in_round(t, federation.config.run.rounds).learning_rate
    steps = t.local_epochs * math.ceil(n / t.batch_size) / (1 - t.momentum)
    columns = [bias, weights.mean(1), weights.norm(dim=1), sent[-num_classes:]]
    standard = [(x - x.mean()) / x.std().clamp(min=1e-12) for x in columns]
    return torch.stack([*standard, torch.ones_like(bias)], dim=1), bias / (rate * steps)


def learned(
    features: Mapping[str, Tensor], truth: Mapping[str, Tensor], known: list[str]
) -> Tensor:
    """Return the weights (F,) of least squares over the classes of all known clients."""
    x_nF = torch.cat([features[c] for c in known])  # noqa: N806
    y_n = torch.cat([truth[c] for c in known])
    ridge = 1e-3 * len(y_n) * torch.eye(x_nF.shape[1], dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(x_nF.T @ x_nF + ridge, x_nF.T @ y_n)
    return weights


def simplex(guess: Tensor) -> Tensor:
    """Return frequencies (C,): nothing below 0, 1 in all."""
    positive = guess.clamp(min=0)
    total = positive.sum()
    return positive / total if total > 0 else torch.full_like(guess, 1 / len(guess))
