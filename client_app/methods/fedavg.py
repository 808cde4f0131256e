"""The clients of FedAvg (arXiv 1602.05629), FedProx (arXiv 1812.06127), and of two models each.

Shapes: B batch, C classes.
"""

# ruff: noqa: N803 - names carry their shape as a suffix

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.methods.base import Method, as_array
from client_app.models.building import trainable
from client_app.models.instances import Instance, instance_of
from client_app.predictor import evaluate_both
from client_app.training.loop import (
    Trained,
    evaluate,
    label_loss,
    logits_of,
    make_optimizer,
    mixed_precision,
    train,
)
from common.messages import EVALUATE_FIRST, THETA, Evaluation
from common.records import Arrays, Received

AUXILIARY = "auxiliary_model"
LABEL_WEIGHTS = (0.5, 0.5)
"""FML: of the labels, for the own and for the auxiliary model; the rest is the teacher's."""


class FedAvg(Method):
    """Trains the model of its group; BatchNorm statistics stay here, as with every method."""

    keeps_theta = False

    def receive(self, task: Received, instance: Instance) -> None:
        """Take the group's model; there is none before the first mean."""
        if THETA in task:
            instance.model.load(self.vector(task, THETA, instance.model.num_parameters))

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the trained model."""
        return {THETA: as_array(instance.model.theta)}


class FedAvgFineTuned(FedAvg):
    """FedAvg, tested after one epoch of local training on top of the received model."""

    def measure(self, task: Received, instance: Instance) -> Evaluation:
        """Test the model as received, then after the epoch; the latter counts."""
        received = evaluate(instance.model, self.data)
        self.adapt(task, instance)
        tuned = evaluate(instance.model, self.data)
        seconds = received.seconds + tuned.seconds
        return replace(tuned, seconds=seconds, others={"global": received.num_correct})

    def adapt(self, task: Received, instance: Instance) -> None:
        """Train one epoch; what it changes is not kept."""
        section = self.participant.in_round(
            self.participant.config.training, task.header.server_round
        )
        section = section.model_copy(update={"local_epochs": 1})
        train(instance.model, self.data, section, generator=self.shuffler("fine-tune", task))


class FedProx(FedAvg):
    """FedAvg with mu / 2 |theta - theta_received|^2 in the loss."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train with the proximal term."""
        received = instance.model.theta.detach().clone()
        parameters = list(trainable(instance.model.module).values())

        def loss(images: Tensor, logits: Tensor, labels: Tensor, hard: Tensor) -> Tensor:
            theta = torch.cat([p.reshape(-1) for p in parameters])
            distance = (theta - received).square().sum()
            return hard + self.settings.fedprox_mu / 2 * distance

        return self.train(task, instance, loss)


class FML(Method):
    """FML (Shen et al. 2020, arXiv 2006.16765): own and auxiliary model teach each other."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Take both models over the same batches."""
        return self._train_both(task, instance, self._auxiliary(task))

    def keep(self, task: Received, instance: Instance) -> None:
        """Keep the own model, and the auxiliary one's BatchNorm statistics."""
        super().keep(task, instance)
        self.save(AUXILIARY, task, instance_of(self.global_kind), theta=False)

    def collect(self, task: Received, instance: Instance) -> Arrays:
        """Send the trained auxiliary model."""
        return {THETA: as_array(instance_of(self.global_kind).model.theta)}

    def losses(self, both: Sequence[Tensor], hard: Sequence[Tensor]) -> list[Tensor]:
        """Return both losses, the own first, from the logits (B, C) and the label losses."""
        return [mutual_loss(both[i], both[1 - i], hard[i], LABEL_WEIGHTS[i]) for i in (0, 1)]

    def _auxiliary(self, task: Received) -> Instance:
        """Load the auxiliary model: as received, or as drawn before the first mean."""
        instance = instance_of(self.global_kind)
        kept = self.load(AUXILIARY, task, instance, before=task.header.server_round)
        if THETA in task:
            instance.model.load(self.vector(task, THETA, instance.model.num_parameters))
        else:
            self.load_theta(instance, kept, "first-auxiliary")
        return instance

    def _train_both(self, task: Received, instance: Instance, auxiliary: Instance) -> Trained:
        started, section = time.monotonic(), self.training(task)
        models = (instance.model, auxiliary.model)
        optimizers = [make_optimizer(model.theta, section) for model in models]
        for model in models:
            model.module.train()
        generator = self.shuffler("shuffle", task)
        total, seen = torch.zeros((), device=instance.model.theta.device), 0
        for _ in range(section.local_epochs):
            for images, labels in self.data.batches(section.batch_size, generator):
                with mixed_precision(section, images.device):
                    both = [
                        logits_of(m.module, images, self.data.num_classes).float() for m in models
                    ]
                hard = [label_loss(logits, labels, section, self.data.loss) for logits in both]
                for i, (model, value) in enumerate(
                    zip(models, self.losses(both, hard), strict=True)
                ):
                    model.backward(value)
                    nn.utils.clip_grad_norm_([model.theta], section.client_clip_norm)
                    if i == 0:
                        total += value.detach() * len(labels)
                for optimizer, model in zip(optimizers, models, strict=True):
                    optimizer.step(model.gradient)
                seen += len(labels)
        return Trained(self.data.num_train, float(total) / seen, time.monotonic() - started)


class FedKD(FML):
    """FedKD (Wu et al. 2022, arXiv 2108.13323, equations 1 to 3): the worse both are, the less KL.

    Differs from paper: logits alone are distilled, hidden layers of unlike architectures are not,
    and what travels is not cut by singular values.
    """

    def losses(self, both: Sequence[Tensor], hard: Sequence[Tensor]) -> list[Tensor]:
        """Return CE + KL / (CE of both together) for each model."""
        doubt = (hard[0] + hard[1]).detach()
        return [hard[i] + mutual_loss(both[i], both[1 - i], hard[i], 0.0) / doubt for i in (0, 1)]


class LocalEnsemble(Method):
    """Own and `global-model`, both trained alone by one recipe; predicts with their mixture."""

    def fit(self, task: Received, instance: Instance) -> Trained:
        """Train both, each on the same batches as everywhere else."""
        second = self._second(task, before=task.header.server_round)
        before = self.train(task, second)
        self.save(AUXILIARY, task, second, theta=True)
        trained = super().fit(task, instance)
        return replace(trained, seconds=before.seconds + trained.seconds)

    def measure(self, task: Received, instance: Instance) -> Evaluation:
        """Test both and their mixture, as trained so far."""
        before = task.header.server_round + (not task.flag(EVALUATE_FIRST))
        return evaluate_both(instance.model, self._second(task, before=before).model, self.data)

    final = measure

    def _second(self, task: Received, *, before: int) -> Instance:
        instance = instance_of(self.global_kind)
        kept = self.load(AUXILIARY, task, instance, before=before)
        self.load_theta(instance, kept, AUXILIARY)
        return instance


def mutual_loss(student_BC: Tensor, teacher_BC: Tensor, hard: Tensor, weight: float) -> Tensor:
    """Return weight hard + (1 - weight) KL(teacher || student), batchmean; hard: `label_loss`.

    The teacher is detached: it learns from a loss of its own.
    """
    divergence = functional.kl_div(
        functional.log_softmax(student_BC, dim=1),
        functional.log_softmax(teacher_BC.detach(), dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return weight * hard + (1 - weight) * divergence
