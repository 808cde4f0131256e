"""Every baseline as a `Method`: same rounds, messages, rejects, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from common import parcels, wire
from common.config import RunConfig
from common.errors import ConfigError
from common.log import logger
from common.wire import Evaluation, Registration
from server_app.clients import Client
from server_app.methods import BASELINES
from server_app.methods.baseline_base import Baseline, Upload
from server_app.transport import Answer, Letter
from server_app.trips import Post, Roster, RoundTally

SYNCHRONOUS = {"max-in-flight": 0, "buffer-size": 0, "max-staleness": 0}


def effective_config(config: RunConfig) -> RunConfig:
    """Return the config as its method runs it: most baselines fold all uploads of a round at once.

    Raises
    ------
    ConfigError
        The baseline cannot run with this config.
    """
    if not config.is_baseline:
        return config
    name, baseline = config.run.method, BASELINES[config.run.method]
    if config.run.novel_only:
        raise ConfigError(
            f"novel-only freezes a hypernetwork, and {name} has none that new clients could learn "
            "against. Set novel-only = false."
        )
    baseline.validate(config)
    if not baseline.synchronous:
        return config
    if config.schedule.max_in_flight or config.schedule.buffer_size:
        logger.info("%s is synchronous: max-in-flight and buffer-size become 0 (everybody)", name)
    return config.with_overrides(SYNCHRONOUS)


class BaselineMethod:
    """Runs the baseline that the config names.

    Attributes
    ----------
    baseline : its server half.
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        name = post.config.run.method
        self.baseline: Baseline[Any] = BASELINES[name](post.config, post.desk.check_norm)
        self._clients: dict[str, Client] = {}

    @property
    def post(self) -> Post:
        """The way to the clients."""
        return self._post

    def require(self, registration: Registration, source: str) -> None:
        """Raise WireError when a registration lacks what the baseline needs."""
        self.baseline.require(registration, source)

    def welcome(self, client: Client) -> None:
        """Remember the client's sizes."""
        self._clients[client.client_id] = client

    def learners(self, clients: list[Client]) -> list[Client]:
        """Return everybody."""
        return clients

    def open_round(self, roster: Roster, tally: RoundTally) -> BaselinePhase:
        """Tell the baseline who takes part; there are no trips before the training."""
        return self.phase(roster, tally)

    def phase(self, roster: Roster, tally: RoundTally) -> BaselinePhase:
        """Return the training of this round."""
        # in order of client_id: what is drawn for newcomers must not depend on the round's shuffle
        self.baseline.open_round([self._clients[c] for c in sorted(roster.nodes)])
        return BaselinePhase(self, roster, tally)

    def close_round(self, server_round: int, tally: RoundTally) -> None:
        """Nothing is left over."""

    def letters(self, roster: Roster, message_type: str) -> Iterator[Letter]:
        """Send what the baseline sends, to be tested or stored."""
        header = self._post.header(roster.server_round)
        for client_id in roster.nodes:
            content = parcels.encode_order(header, self.baseline.download(self.client(client_id)))
            yield Letter(roster.ticket(client_id, message_type), content)

    def client(self, client_id: str) -> Client:
        """Return a client as it last registered."""
        return self._clients[client_id]

    def decode_evaluation(self, content: RecordDict, source: str) -> Evaluation:
        """Decode test counts, with those of the baseline's other predictors."""
        return wire.decode_evaluation(content, source, self.baseline.others)

    def facts(self, client_id: str) -> dict[str, object]:
        """Return the client's group tag where the baseline asked for one."""
        return {"group": self.client(client_id).group} if "group" in self.baseline.needs else {}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the baseline's state."""
        tensors, meta = self.baseline.export()
        return tensors, {"baseline": meta}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the baseline's state; clients' own models are theirs to restore."""
        self.baseline.restore(tensors, meta["baseline"])
        if not self._post.config.client.state_dir:
            logger.warning(
                "What %s keeps on clients (own models, BatchNorm statistics) is lost where they "
                "have no state-dir: such a client starts anew. Set state-dir to resume exactly.",
                self._post.config.run.method,
            )


class BaselinePhase:
    """The training of one round: the `RoundActions` of the schedule."""

    def __init__(self, method: BaselineMethod, roster: Roster, tally: RoundTally) -> None:
        self._method, self._roster, self._tally = method, roster, tally
        self._post, self._baseline = method.post, method.baseline

    @property
    def num_steps(self) -> int:
        """Count the server steps taken so far."""
        return self._post.num_steps

    def letters(self, client_ids: Sequence[str]) -> Iterator[Letter]:
        """Wrap up what goes down to these clients, each when it is asked for."""
        for client_id in client_ids:
            started = time.monotonic()
            letter = self._letter(client_id)
            self._tally.seconds_server += time.monotonic() - started
            yield letter

    def _letter(self, client_id: str) -> Letter:
        config = self._post.config
        content = parcels.encode_order(
            self._post.header(self._roster.server_round),
            self._baseline.download(self._method.client(client_id)),
            training=config.training,
            evaluate=config.run.evaluation == "fused",
        )
        ticket = self._roster.ticket(client_id, wire.TRAIN_PERSONAL, self._post.num_steps)
        return Letter(ticket, content)

    def accept(self, answer: Answer) -> Upload[Any] | None:
        """Turn a good answer into an upload; note its counts and losses."""
        client = self._method.client(answer.ticket.client_id)

        def decode(content: RecordDict, source: str) -> tuple[parcels.Work, Any]:
            work, parcel = parcels.decode_work(content, source, self._baseline.others)
            return work, self._baseline.read(client, parcel)

        found = self._post.desk.read(answer, decode)
        if found is None:
            return None
        work, content = found
        self._tally.seconds_clients += work.seconds
        self._tally.train_losses[client.client_id] = (work.num_examples, work.train_loss)
        if work.evaluation is not None:
            self._tally.evaluations[client.client_id] = work.evaluation
        return Upload(client, work.num_examples, content)

    def step(self, uploads: Sequence[Upload[Any]]) -> None:
        """Fold the uploads in, in an order that does not depend on their arrival."""
        started = time.monotonic()
        ordered = sorted(uploads, key=lambda upload: upload.client.client_id)
        self._baseline.fold(ordered, self._roster.server_round)
        self._post.num_steps += 1
        self._tally.seconds_server += time.monotonic() - started
