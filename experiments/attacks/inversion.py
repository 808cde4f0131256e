"""Gradient inversion: the pictures of one small batch, from the delta of one step on them.

The client trains one step on a few of its pictures; the server takes the gradient out of the delta
(it knows the rate and the weight decay) and looks for pictures with that gradient: Adam on the sign
of the derivative of 1 - cosine + a total variation (Geiping et al. 2020). The labels count as
known: the attack `labels` finds them. Harder for the server in a real round, whose delta is many
steps on other batches; this is the worst case.

Shapes: B pictures, C channels, H = W image size, P parameters.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.examples import ClientData
from client_app.models.building import trainable
from client_app.models.instances import FlatModel
from client_app.training.loop import label_loss
from common.errors import ConfigError
from experiments.attacks.federation import OWN, Federation, trained_on

SMOOTHNESS = 1e-3
"""Weight of the total variation."""
RATE, MOST_PICTURES, WINDOW = 0.1, 4, 7


def attack(federation: Federation, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return PSNR (dB) and SSIM of the pictures found, and of a guess; one row a victim.

    Above each other in attack-inversion.png: the pictures, what was found, the guess.
    """
    count = args.pictures
    if not 1 <= count <= MOST_PICTURES:
        raise ConfigError(f"attack: --pictures {count}; expected 1 to {MOST_PICTURES}.")
    rows, strips = [], []
    everybody = federation.clients()
    for client_id in everybody[: args.clients]:
        data = federation.participant(client_id).data
        wanted = first_of_each_class(data, count)
        batch = trained_on(data, wanted)
        answer = federation.answer(
            client_id, batch, batch_size=count, local_epochs=1, learning_rate_final=1.0
        )
        t = federation.config.training
        gradient = answer.delta[OWN] / t.learning_rate - t.weight_decay * answer.sent[OWN]
        model = federation.model(client_id, OWN, answer.sent[OWN])
        found = invert(model, gradient, batch, federation, steps=args.steps)
        truth = data.normalise(batch.train_images)
        true, seen = (as_pictures(x, data) for x in (truth, found))
        seen = seen[list(best_order(true, seen))]
        rest = data.test_images.double().mean(0, keepdim=True).expand_as(true) / 255
        rows.append(
            {
                "client": client_id,
                "psnr_db": psnr(true, seen),
                "ssim": ssim(true, seen),
                "psnr_db_of_the_mean_picture": psnr(true, rest),
                "ssim_of_the_mean_picture": ssim(true, rest),
            }
        )
        strips.append(torch.cat([true, seen, rest]))
    save_picture(strips, federation, count)
    return rows


def first_of_each_class(data: ClientData, count: int) -> Tensor:
    """Return the rows of a client's first training examples, of as many classes as there are."""
    labels = data.train_labels.tolist()
    firsts = sorted({label: labels.index(label) for label in set(labels)}.values())
    rest = [i for i in range(len(labels)) if i not in firsts]
    return torch.tensor([*firsts, *rest][:count])


def invert(
    model: FlatModel, gradient: Tensor, batch: ClientData, federation: Federation, *, steps: int
) -> Tensor:
    """Return normalised pictures (B, C, H, W) whose gradient points where `gradient` (P,) does."""
    parameters, labels = list(trainable(model.module).values()), batch.train_labels
    black, white = (batch.normalise(torch.full_like(batch.train_images, x)) for x in (0, 255))
    generator = torch.Generator().manual_seed(0)
    found = nn.Parameter(torch.randn(black.shape, generator=generator))
    optimizer = torch.optim.Adam([found], lr=RATE)
    for step in range(steps):
        logits = model.module(found)
        loss = label_loss(logits, labels, federation.config.training)
        parts = torch.autograd.grad(loss, parameters, create_graph=True)
        mine = torch.cat([part.reshape(-1) for part in parts])
        distance = 1 - functional.cosine_similarity(mine, gradient, dim=0)
        (found.grad,) = torch.autograd.grad(distance + SMOOTHNESS * variation(found), found)
        found.grad.sign_()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (
                1.0 if step < steps // 2 else 0.1 if step < steps * 7 // 8 else 0.01
            )
        optimizer.step()
        with torch.no_grad():
            found.copy_(found.clamp(min=black, max=white))
    return found.detach()


def variation(pictures: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels of pictures (B, C, H, W)."""
    down = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean()
    right = (pictures[..., 1:] - pictures[..., :-1]).abs().mean()
    return down + right


def as_pictures(normalised: Tensor, data: ClientData) -> Tensor:
    """Return normalised pictures (B, C, H, W) as intensities from 0 to 1, float64."""
    mean, std = (x.double().view(1, -1, 1, 1) for x in (data.mean, data.std))
    return (normalised.double() * std + mean).clamp(0, 1)


def best_order(true: Tensor, found: Tensor) -> tuple[int, ...]:
    """Return the order of the pictures found that fits the true ones (B, C, H, W) best."""
    errors = (true[:, None] - found[None]).square().flatten(2).mean(2)
    orders = permutations(range(len(true)))
    return min(orders, key=lambda order: float(errors[range(len(order)), order].sum()))


def psnr(true: Tensor, found: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of pictures (B, C, H, W) from 0 to 1."""
    errors = (true - found).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * torch.log10(errors)).mean())


def ssim(true: Tensor, found: Tensor) -> float:
    """Return the mean structural similarity (Wang et al. 2004) over windows of 7 x 7 pixels."""

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, WINDOW, stride=1)

    a, b = mean(true), mean(found)
    aa, bb = mean(true * true) - a * a, mean(found * found) - b * b
    ab = mean(true * found) - a * b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return float(similarity.mean())


def save_picture(strips: list[Tensor], federation: Federation, count: int) -> None:
    """Draw the victims' strips (3 B, C, H, W) beside each other."""
    columns = [
        torch.cat([torch.cat([*x], dim=2) for x in torch.split(s, count)], dim=1) for s in strips
    ]
    picture = torch.cat(columns, dim=2).permute(1, 2, 0)
    if picture.shape[2] == 1:
        picture = picture.expand(-1, -1, 3)
    pixels = (picture * 255).round().numpy().astype(np.uint8)
    scale = 4
    image = Image.fromarray(pixels).resize(
        (pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST
    )
    image.save(federation.run.folder / "attack-inversion.png")
