"""Membership inference: whether an example was trained on.

Members are a client's training examples, others those that it held back; of every label of every
client equally many of both are judged, so that a label by itself tells nothing. Every score is
higher where the attacker believes in membership; all victims' scores are pooled.

- loss: how well the trained weights fit an example (Yeom et al. 2018);
- loss difference: how much better than the weights that were sent;
- calibrated loss: how much better than the weights made for four others, which say how hard an
  example is (Watson et al. 2022);
- gradient alignment: the cosine of an example's gradient, at the weights sent, with the delta;
- LiRA (Carlini et al. 2022): shadow clients start from the weights sent and train, by the same
  recipe, on a random half of the client's examples; an example's logit-scaled confidence under the
  real delta is compared with those of shadows that had it and that had it not;
- others: the loss under the weights that the server generates for another participant.

Shapes: P parameters, N examples, K shadows.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn import functional

from client_app.models.instances import FlatModel
from client_app.training.private import PrivateStep
from experiments.attacks.federation import (
    Answer,
    Federation,
    losses,
    members_and_others,
    trained_on,
)

FALSE_POSITIVES = 0.01
OTHERS = 4


def attack(federation: Federation, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return AUC, and the true-positive rate at 1 % false positives, of every score."""
    scores: dict[str, list[Tensor]] = defaultdict(list)
    truth: list[Tensor] = []
    victims = federation.clients(args.clients)
    for client_id in victims:
        _, labels, members = members_and_others(federation.participant(client_id).data)
        rows = matched(labels, members)
        for name, found in scores_of(federation, client_id, args.shadows).items():
            scores[name].append(found[rows])
        truth.append(members[rows])
    everybody = torch.cat(truth)
    return [
        {"seen_by": name.partition(":")[0], "score": name.partition(": ")[2],
         **judged(torch.cat(found), everybody),
         "members": int(everybody.sum()), "others": int((~everybody).sum())}
        for name, found in scores.items()
    ]  # fmt: skip


def matched(labels: Tensor, members: Tensor) -> Tensor:
    """Return rows (M,) with equally many members and others of every label, drawn at random."""
    generator, rows = torch.Generator().manual_seed(0), []
    for label in torch.unique(labels):
        both = [torch.nonzero((labels == label) & who).flatten() for who in (members, ~members)]
        count = min(len(part) for part in both)
        rows += [p[torch.randperm(len(p), generator=generator)[:count]] for p in both]
    return torch.cat(rows)


def judged(scores: Tensor, members: Tensor) -> dict[str, float]:
    """Return `auc` and `tpr_at_fpr_1_percent` of scores (N,) with the truth (N,)."""
    rates, hits, _ = roc_curve(members.numpy(), scores.numpy())
    few = hits[rates <= FALSE_POSITIVES]
    auc = float(roc_auc_score(members.numpy(), scores.numpy()))
    return {"auc": auc, "tpr_at_fpr_1_percent": float(few.max())}


def scores_of(federation: Federation, client_id: str, num_shadows: int) -> Mapping[str, Tensor]:
    """Return every attack's scores (N,) of one client's examples."""
    data = federation.participant(client_id).data
    images, labels, _ = members_and_others(data)
    answer = federation.answer(client_id)
    found: dict[str, Tensor] = {}
    for model in answer.delta:
        before = losses(federation.model(client_id, model, answer.sent[model]), images, labels)
        after = losses(federation.model(client_id, model, answer.after(model)), images, labels)
        found[f"server: loss, {model}"] = -after
        found[f"server: loss difference, {model}"] = before - after
        hardness = [
            losses(other, images, labels) for other in _others(federation, client_id, model)
        ]
        if hardness:
            found[f"server: calibrated loss, {model}"] = torch.stack(hardness).mean(0) - after
        found[f"server: gradient alignment, {model}"] = alignment(
            federation, client_id, model, answer
        )
    if num_shadows:
        found["server: LiRA, own"] = lira(federation, client_id, answer, num_shadows)
    for model in answer.delta:
        for other in islice(_others(federation, client_id, model), 1):
            found[f"another participant: loss, {model}"] = -losses(other, images, labels)
    return found


def _others(federation: Federation, client_id: str, name: str) -> Iterator[FlatModel]:
    """Yield the models generated for the next clients, each borrowed until the next is."""
    everybody = federation.clients()
    after = everybody.index(client_id) + 1
    for other_id in (everybody[after:] + everybody[: after - 1])[:OTHERS]:
        yield federation.model(other_id, name, federation.weights(other_id)[name])


def alignment(federation: Federation, client_id: str, name: str, answer: Answer) -> Tensor:
    """Return the cosine (N,) of every example's gradient with the delta."""
    model = federation.model(client_id, name, answer.sent[name])
    data = federation.participant(client_id).data
    images, labels, _ = members_and_others(data)
    step = PrivateStep(model, federation.config.training, data.num_classes, 1.0)
    delta, found = answer.delta[name], []
    for row in range(len(labels)):
        gradient, _ = step.of_one(images[row : row + 1], labels[row : row + 1])
        found.append(functional.cosine_similarity(gradient, delta, dim=0).double())
    return torch.stack(found)


def lira(federation: Federation, client_id: str, answer: Answer, num_shadows: int) -> Tensor:
    """Return the log likelihood ratios (N,) of having been trained on, in this last message."""
    data = federation.participant(client_id).data
    images, labels, _ = members_and_others(data)
    generator = torch.Generator().manual_seed(int(client_id))
    halves: list[Tensor] = []
    confidences: list[Tensor] = []
    for _ in range(num_shadows):
        rows = torch.randperm(len(labels), generator=generator)[: data.num_train]
        half = torch.zeros(len(labels), dtype=torch.bool)
        half[rows] = True
        shadow = federation.answer(client_id, trained_on(data, rows))
        halves.append(half)
        confidences.append(_confidence(federation, client_id, shadow, images, labels))
    seen = _confidence(federation, client_id, answer, images, labels)
    return likelihood_ratio(seen, torch.stack(confidences), torch.stack(halves))


def likelihood_ratio(seen: Tensor, confidences: Tensor, had_it: Tensor) -> Tensor:
    """Compare confidences (N,) with those (K, N) of shadows, normal with and without the example.

    One standard deviation for all examples, as for few shadows.
    """
    means: list[Tensor] = []
    residuals: list[Tensor] = []
    for group in (had_it, ~had_it):
        count = group.sum(0).clamp(min=1)
        mean = (confidences * group).sum(0) / count
        means.append(torch.where(group.any(0), mean, confidences.mean(0)))
        residuals.append((confidences - mean)[group])
    variance = torch.cat(residuals).square().mean().clamp(min=1e-12)
    inside, outside = ((seen - mean).square() for mean in means)
    return (outside - inside) / (2 * variance)


def _confidence(
    federation: Federation, client_id: str, answer: Answer, images: Tensor, labels: Tensor
) -> Tensor:
    """Return log(p / (1 - p)) (N,) of the right class under the trained weights."""
    model = federation.model(client_id, "own", answer.after("own"))
    loss = losses(model, images, labels)
    return -loss - torch.log(-torch.expm1(-loss.clamp(min=1e-9)))
