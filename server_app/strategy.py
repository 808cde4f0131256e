"""The rounds, whatever the method: who is there; train through the schedule; test; report; save.

Not a subclass of Flower's Strategy, which would bring nothing: its loop sends everybody the same
arrays, once a phase, and a ServerApp may run any loop over its grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from common import messages
from common.errors import RunError
from common.log import logger
from common.messages import MOST_WEIGHT, Evaluation, Recipient, TrainReply, weighted_mean
from common.records import Content, Received
from common.seeding import numpy_generator
from server_app.admission import Admission
from server_app.aggregation.base import StepDiagnostics, mean_diagnostics
from server_app.clients import Client, Registry
from server_app.methods.base import Method, Upload
from server_app.output.run_folder import RunFolder, summarise
from server_app.scheduler import MOST_SHORT_ROUNDS, RoundOutcome, Schedule, last_round, sample
from server_app.transport import Arrival, Outgoing, Transport

T = TypeVar("T")


class TrainingRound:
    """The training of one round: the scheduler's `RoundActions`, and what they measured."""

    def __init__(
        self,
        server_round: int,
        clients: Sequence[Client],
        method: Method[Any],
        transport: Transport,
        registry: Registry,
    ) -> None:
        self.number, self._clients = server_round, clients
        self._method, self._transport, self._registry = method, transport, registry
        self._config = method.config
        self.evaluations: dict[str, Evaluation] = {}
        self.trained: dict[str, TrainReply] = {}
        self.diagnostics: list[StepDiagnostics] = []
        self.seconds_clients = self.seconds_server = 0.0
        self._num_accepted = 0

    @property
    def num_steps(self) -> int:
        """Count the server steps taken so far."""
        return self._method.num_steps

    def open(self) -> None:
        """Let the method begin; what it draws must not depend on the order of this round."""
        ordered = sorted(self._clients, key=lambda client: client.client_id)
        self.seconds_server -= time.monotonic()
        self._method.open_round(self.number, ordered, self._exchange)
        self.seconds_server += time.monotonic()

    def messages(self, client_ids: Sequence[str]) -> Iterator[Outgoing]:
        """Make the training messages of these clients, each when it is asked for."""
        clients = [self._registry.client(client_id) for client_id in client_ids]
        contents = self._method.contents(clients, training=True)
        for client in clients:
            self.seconds_server -= time.monotonic()
            tests = self._config.run.evaluation == "fused"
            outgoing = self._message(client, next(contents), tests=tests)
            self.seconds_server += time.monotonic()
            yield outgoing

    def accept(self, arrival: Arrival) -> Upload[Any] | None:
        """Turn a good reply into an upload; note its counts and losses."""
        if (found := self._read(arrival, self._method.read)) is None:
            return None
        trained, upload = found
        client_id = upload.client.client_id
        self._num_accepted += 1
        self.trained[client_id] = trained
        if trained.evaluation is not None:
            self.evaluations[client_id] = trained.evaluation
        return upload

    def step(self, uploads: Sequence[Upload[Any]]) -> None:
        """Take one server step, in an order that does not depend on the replies' arrival."""
        self.seconds_server -= time.monotonic()
        ordered = sorted(uploads, key=lambda u: (u.client.client_id, u.staleness))
        progress = self.number - 1 + min(1.0, self._num_accepted / len(self._clients))
        step = self._method.learn(ordered, server_round=self.number, progress=progress)
        self._method.num_steps += 1
        if step is not None:
            self.diagnostics.append(step)
        self.seconds_server += time.monotonic()

    def _exchange(
        self,
        contents: Iterable[tuple[Client, Content]],
        read: Callable[[Client, Received], T],
    ) -> list[Upload[T]]:
        """Exchange the method's own messages with all who are free (`Exchange`)."""
        self.seconds_server += time.monotonic()  # `open` counts what the method does, not the wait
        busy = self._transport.busy_nodes()
        patience = self._config.schedule.round_deadline_s or math.inf
        outgoing = (
            self._message(client, content, patience_s=patience)
            for client, content in contents
            if client.node_id not in busy
        )
        found = [self._read(arrival, read) for arrival in self._transport.exchange(outgoing)]
        self.seconds_server -= time.monotonic()
        return [upload for _, upload in filter(None, found)]

    def _message(
        self, client: Client, content: Content, *, tests: bool = False, patience_s: float = math.inf
    ) -> Outgoing:
        settings = self._method.training_keys | {messages.EVALUATE_FIRST: tests}
        return self._transport.message(
            messages.TRAIN,
            Recipient(client.client_id, client.node_id, client.most_bytes),
            replace(content, settings={**settings, **content.settings}),
            server_round=self.number,
            version=self._method.num_steps,
            patience_s=patience_s,
        )

    def _read(
        self, arrival: Arrival, read: Callable[[Client, Received], T]
    ) -> tuple[TrainReply, Upload[T]] | None:
        client = self._registry.client(arrival.pending.client_id)

        def both(reply: Received) -> tuple[TrainReply, T]:
            others = self._method.others
            trained = TrainReply.read(reply, most=client.num_examples, others=others)
            return trained, read(client, reply)

        if (found := self._transport.read(arrival, both)) is None:
            return None
        trained, content = found
        self.seconds_clients += trained.seconds
        staleness = self._method.num_steps - arrival.pending.version
        return trained, Upload(client, trained.num_examples, content, staleness)


class Rounds:
    """Runs rounds of a method over whoever is present; `save` writes a checkpoint."""

    def __init__(
        self,
        method: Method[Any],
        transport: Transport,
        registry: Registry,
        folder: RunFolder,
        save: Callable[[], None],
    ) -> None:
        self._config, self._method = method.config, method
        self._transport, self._registry = transport, registry
        self._folder, self._save, self._short_rounds = folder, save, 0
        self._last = method.config.run.rounds
        self._admission = Admission(self._config, transport, registry, method.add_client)
        self._schedule = Schedule(self._config.schedule, transport)

    def run(self, first: int = 1) -> None:
        """Run the rounds from `first` on; each is on disk before the next one starts."""
        run, schedule = self._config.run, self._config.schedule
        slots = schedule.max_in_flight or "all", schedule.buffer_size or "= max-in-flight"
        words = "%s: rounds %d-%d, seed %d, max-in-flight %s, buffer-size %s"
        logger.info(words, run.method, first, run.rounds, run.seed, *slots)
        for server_round in range(first, run.rounds + 1):
            row = self.run_round(server_round)
            self._folder.add_round(row, self._last)
            if server_round % run.checkpoint_every == 0 or server_round == self._last:
                self._save()
            self._require_enough(row, server_round)
            if server_round == self._last:
                break
            self._last = last_round(run, self._folder.rows)
        self._finish(self._last)

    def _gather(self, server_round: int) -> list[Client]:
        """Return who is present; where they are too few, what was learned is saved first."""
        try:
            return self._admission.refresh(server_round)
        except Exception:
            if self._folder.rows:
                self._save()
            raise

    def run_round(self, server_round: int) -> dict[str, float]:
        """Run one round; return its row of metrics.jsonl."""
        started, transport, run = time.monotonic(), self._transport, self._config.run
        schedule, down, up = self._config.schedule, transport.bytes_down, transport.bytes_up
        clients, asked = self._gather(server_round), self._registry.asked
        # the published algorithm trains clients in random order
        rng = numpy_generator(run.seed, "client-order", server_round=server_round)
        learners = sample(self._method.learners(clients), schedule, asked, rng)
        asked |= dict.fromkeys((client.client_id for client in learners), server_round)
        training = TrainingRound(server_round, learners, self._method, transport, self._registry)
        training.open()
        queue, last = [(c.client_id, c.node_id) for c in learners], server_round == self._last
        outcome = self._schedule.run_round(server_round, queue, training, last=last)
        training.seconds_server -= time.monotonic()
        global_row = self._method.close_round()
        training.seconds_server += time.monotonic()
        evaluations = training.evaluations
        if last or (run.evaluation == "separate" and server_round % run.evaluate_every == 0):
            read = partial(Evaluation.read_if_told, others=self._method.others)
            tested = learners if schedule.clients_per_round and not last else clients
            evaluations = self._ask(tested, server_round, messages.EVALUATE, read)
        self._folder.note_clients(self._client_rows(evaluations))
        self._folder.note_attendance(self._admission.attendance(server_round, training.trained))
        self._registry.ask_again(transport.misfits, server_round)  # perhaps their model changed
        transport.misfits.clear()
        seconds = time.monotonic() - started
        return {
            "round": server_round,
            **summarise(evaluations),
            "num_evaluated": len(evaluations),
            **_train_row(training, outcome),
            **global_row,
            "bytes_up": transport.bytes_up - up,
            "bytes_down": transport.bytes_down - down,
            "seconds_round": seconds,
            "seconds_waiting": seconds - training.seconds_server,
        }

    def _ask(
        self,
        clients: list[Client],
        server_round: int,
        message_type: str,
        read: Callable[[Received], T | None],
    ) -> dict[str, T]:
        """Send all who are free the newest weights; return what good ones tell, by client."""
        transport, busy = self._transport, self._transport.busy_nodes()
        free = [c for c in clients if c.node_id not in busy and c.client_id not in transport.silent]
        contents = self._method.contents(free, training=False)
        wait = self._config.schedule.round_deadline_s or math.inf
        make = partial(transport.message, message_type, server_round=server_round, patience_s=wait)
        outgoing = (
            make(Recipient(client.client_id, client.node_id), content)
            for client, content in zip(free, contents, strict=True)
        )
        found = {a.pending.client_id: transport.read(a, read) for a in transport.exchange(outgoing)}
        return {client_id: reply for client_id, reply in found.items() if reply is not None}

    def _finish(self, server_round: int) -> None:
        clients = self._registry.present(server_round)
        read = partial(Received.value, key=messages.LOCATION, kind=str)
        stored = self._ask(clients, server_round, messages.FINISH, read)
        if locations := sorted(filter(None, stored.values())):
            words = "Personal models of %d clients stored, e.g. %.200r"
            logger.info(words, len(stored), locations[0])

    def _require_enough(self, row: Mapping[str, float], server_round: int) -> None:
        asked = row["num_accepted"] + row["num_failed"] + row["num_unanswered"]
        fraction, few = (s := self._config.schedule).min_fraction, s.clients_per_round
        self._short_rounds = self._short_rounds + 1 if row["num_accepted"] < fraction * asked else 0
        if self._short_rounds > MOST_SHORT_ROUNDS * bool(few):
            self._save()
            raise RunError(
                f"round {server_round}: {int(row['num_accepted'])} of {int(asked)} clients sent a "
                f"usable update; min-fraction {fraction:g} needs {fraction * asked:g}. Everything "
                "learned so far is in the checkpoint; see the rejected replies above, then resume "
                "with resume-from."
            )

    def _client_rows(self, evaluations: Mapping[str, Evaluation]) -> list[dict[str, object]]:
        return [
            {
                "client_id": client.client_id,
                "num_parameters": client.num_parameters,
                **self._method.facts(client),
                "num_train": client.num_examples,
                "num_test": tested.num_test,
                "correct": tested.num_correct,
                **tested.accuracies(),
                "test_loss": tested.test_loss,
                "rejected": self._transport.rejected[client.client_id],
            }
            for client, tested in ((self._registry.client(i), e) for i, e in evaluations.items())
        ]


def _train_row(training: TrainingRound, outcome: RoundOutcome) -> dict[str, float]:
    replies = training.trained.values()
    told = [(r.num_examples, r.train_loss) for r in replies if r.train_loss is not None]
    weights = messages.bounded_counts([count for count, _ in told], MOST_WEIGHT) if told else []
    spent = [r.epsilon for r in replies if r.epsilon is not None]
    return {
        "train_loss": weighted_mean(zip(weights, (loss for _, loss in told), strict=True)),
        **({"epsilon_max": max(spent)} if spent else {}),
        "seconds_server": training.seconds_server,
        "seconds_clients": training.seconds_clients,
        **outcome.counts(),
        **mean_diagnostics(training.diagnostics),
    }
