"""A finished, simulated run that can be asked for one more training message.

Server and clients are built from the run's config and its newest checkpoint, and do what they did
in the run: the message is the server's own, and the answer the client's.

Shapes: P parameters of a client's model, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import Context, RecordDict
from torch import Tensor
from torch.nn import functional

from client_app.data.examples import ClientData
from client_app.methods.mhpfedhn import GLOBAL, PERSONAL, MHpFedHN, Role
from client_app.models.instances import FlatModel, instance_of
from client_app.participant import Participant
from common.config import RunConfig
from common.errors import ConfigError, RunError
from common.messages import EVALUATE_FIRST, TRAIN
from common.methods import method_class
from common.records import Content, Header, Received, encode
from experiments.report.runs import Run
from server_app.app import CHECKPOINTS
from server_app.clients import Registry
from server_app.output.checkpoint import load_checkpoint

METHODS = ("mh-pfedhn", "mh-pfedhn-pg")
OURS: dict[str, Any] = {
    "resume-from": "", "novel-only": False, "state-dir": "", "measure-alone": False,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What one message told the server: weights (P,) as sent and the delta (P,), of each model."""

    sent: Mapping[str, Tensor]
    delta: Mapping[str, Tensor]

    def after(self, name: str) -> Tensor:
        """Return the weights (P,) as they were after training."""
        return self.sent[name] - self.delta[name]


OWN, COMMON = "own", "common"
ROLES: Mapping[str, Role] = {OWN: PERSONAL, COMMON: GLOBAL}


class Federation:
    """The server of a run, and its clients; `changed` are the settings that are not the run's.

    Raises RunError where the run is no simulation of MH-pFedHN or MH-pFedHN-PG with a checkpoint.
    """

    def __init__(self, run: Run, changed: Mapping[str, Any]) -> None:
        self.run, self.changed = run, dict(changed)
        known = {k: v for k, v in run.config.items() if k in RunConfig.key_names()}
        config = RunConfig.parse({**known, **OURS, **changed})
        if config.run.method not in METHODS:
            raise ConfigError(
                f"attack: {run.folder} is a run of {config.run.method}; attacks are made for "
                f"{' and '.join(METHODS)}."
            )
        kind = method_class(config.run.method, "server_app")
        self.config: RunConfig = kind.adapted(config)
        self.server = kind(self.config)
        checkpoint = load_checkpoint(run.folder / CHECKPOINTS)
        self.server.load_state_dict(checkpoint.tensors, checkpoint.meta["learned"])
        self.registry = Registry(config.hypernet.max_parameters, self.server.admit)
        self.registry.restore(checkpoint.meta["registry"])
        self.federation_id = str(checkpoint.meta["federation-id"])

    def clients(self, most: int = 10**9) -> list[str]:
        """Return the client_ids, at most so many."""
        known = list(self.registry.clients())
        if not all(client_id.isdecimal() for client_id in known):
            raise RunError(
                f"attack: {self.run.folder} was no simulation: its clients' data are not here."
            )
        return sorted(known, key=int)[:most]

    def participant(self, client_id: str) -> Participant:
        """Open a client as the in-process engine does, with nothing kept from the run."""
        node: dict[str, bool | int | float | str] = {
            "partition-id": int(client_id),
            "num-partitions": self.config.client.num_partitions,
        }
        context = Context(1, 2, node, RecordDict(), dict(self.config.flat()))
        return Participant.open(context)

    def method(self, client_id: str, data: ClientData | None = None) -> MHpFedHN:
        """Return the client's half of the method, on its own data or on others."""
        participant = self.participant(client_id)
        if data is not None:
            participant = replace(participant, data=data)
        made: MHpFedHN = method_class(self.config.run.method, "client_app")(participant)
        return made

    def message(self, client_id: str, **settings: Any) -> RecordDict:
        """Make the server's training message, after the run's last round."""
        client = self.registry.client(client_id)
        content = next(iter(self.server.contents([client], training=True)))
        usual = {**self.server.training_keys, EVALUATE_FIRST: False, **content.settings}
        usual |= {key.replace("_", "-"): value for key, value in settings.items()}
        run = self.config.run
        header = Header(self.federation_id, run.method, run.rounds, "attack", "float32")
        return encode(header, replace(content, settings=usual))

    def weights(self, client_id: str) -> dict[str, Tensor]:
        """Return what the client is given: weights (P,) of each model, as they are used."""
        method, message = self.method(client_id), Received(self.message(client_id))
        return {
            name: method.placed(role, method.start(role, message)).clone()
            for name, role in ROLES.items()
            if role.theta in message
        }

    def answer(self, client_id: str, data: ClientData | None = None, **settings: Any) -> Answer:
        """Let a client answer one more message by the run's recipe, or with some settings changed.

        `data` stands for the client's own examples.
        """
        method, message = self.method(client_id, data), self.message(client_id, **settings)
        task = method.participant.task(message)
        reply: Content = method.reply(TRAIN, task)
        received = Received(encode(task.header, reply))
        found = self.server.read(self.registry.client(client_id), received)
        deltas = {OWN: torch.from_numpy(found.personal)}
        if found.shared is not None:
            deltas[COMMON] = torch.from_numpy(found.shared)
        return Answer(self.weights(client_id), deltas)

    def model(self, client_id: str, name: str, weights: Tensor) -> FlatModel:
        """Return a model with these weights (P,), in evaluation mode; borrowed until the next."""
        model = instance_of(self.method(client_id).kind_of(ROLES[name])).model
        model.load(weights)
        model.module.eval()
        return model


@torch.no_grad()
def losses(model: FlatModel, images: Tensor, labels: Tensor) -> Tensor:
    """Return every example's cross-entropy (N,), float64."""
    parts = [model.module(part) for part in torch.split(images, 128)]
    return functional.cross_entropy(torch.cat(parts).double(), labels, reduction="none")


def members_and_others(data: ClientData) -> tuple[Tensor, Tensor, Tensor]:
    """Return a client's examples, normalised (N, ...), their labels (N,), and who was trained on.

    Those trained on come first, then all that were held back.
    """
    pictures = (data.train_images, data.validation_images, data.test_images)
    labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    images = data.normalise(torch.cat([*pictures]))
    return images, labels, torch.arange(len(labels)) < data.num_train


def trained_on(data: ClientData, rows: Tensor) -> ClientData:
    """Return the client's data with those examples to train on, of `members_and_others`."""
    images = torch.cat([data.train_images, data.validation_images, data.test_images])
    labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    return replace(data, train_images=images[rows], train_labels=labels[rows])


def histogram(data: ClientData) -> Tensor:
    """Return the frequencies (C,) of a client's training labels."""
    counts = torch.bincount(data.train_labels, minlength=data.num_classes).double()
    return counts / counts.sum()


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, NaN of none."""
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else float("nan")
