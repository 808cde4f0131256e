"""Rounds as a Flower Strategy, whatever the method: MH-pFedHN, MH-pFedHNGD or a baseline.

One round: who is there; train through the schedule; evaluate; report; save. What a method learns
from the replies is behind `Method`. The strategy knows counts and vectors, no architecture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from common import wire
from common.errors import ConfigError, RunError
from common.log import logger
from common.metrics import summarise, weighted_mean
from common.seeding import numpy_generator
from common.wire import Evaluation
from server_app.admission import Admission
from server_app.aggregation.diagnostics import global_diagnostics, mean_diagnostics
from server_app.clients import Client, Registry
from server_app.methods.base import Method
from server_app.output.run_folder import RunFolder
from server_app.output.snapshot import save_server
from server_app.scheduler import RoundOutcome, Schedule
from server_app.transport import Answer, Letter
from server_app.trips import Roster, RoundTally, ask_all, without_busy

T = TypeVar("T")


class Rounds(Strategy):
    """Runs rounds of a method over whoever is present.

    Parameters
    ----------
    method : what goes out, what is learned from what comes back; it holds the mailbox.
    registry : who is who.
    folder : where results go.
    first_round : 1, or the round after the checkpoint that was loaded.
    """

    def __init__(
        self, method: Method, registry: Registry, folder: RunFolder, first_round: int = 1
    ) -> None:
        self._method = method
        self._post = method.post
        self._registry = registry
        self._folder = folder
        self._first_round = first_round
        self._admission = Admission(method, registry)
        self._schedule = Schedule(self._post.config.schedule, self._post.mailbox)

    # --- the run ---------------------------------------------------------------------------------

    def start(  # type: ignore[override]  # the rounds are ours; Flower's extras have no use here
        self, grid: Grid, num_rounds: int | None = None, **_: object
    ) -> Result:
        """Run all rounds; every finished round is on disk before the next one starts."""
        rounds = num_rounds or self._post.config.run.rounds
        result = Result()
        self.summary()
        if self._first_round > rounds:
            self._nothing_left(rounds)
        for server_round in range(self._first_round, rounds + 1):
            row = self._run_or_rescue(grid, server_round)
            self._folder.add_round(row, rounds)
            result.train_metrics_clientapp[server_round] = MetricRecord(dict(row))
            if server_round % self._post.config.run.checkpoint_every == 0 or server_round == rounds:
                self._checkpoint()
            self._require_enough(row, server_round)
        self._finish(grid, rounds)
        return result

    def _run_or_rescue(self, grid: Grid, server_round: int) -> dict[str, float]:
        """Run a round; when it breaks, save what was learned up to there before the run ends."""
        try:
            return self.run_round(grid, server_round)
        except Exception:  # whatever it is, it is raised again
            if self._folder.rows:
                self._checkpoint()
            raise

    def run_round(self, grid: Grid, server_round: int) -> dict[str, float]:
        """Run one round: registration, global phase, personal phase, evaluation; return its row."""
        started = time.monotonic()
        down, up = self._post.mailbox.bytes_down, self._post.mailbox.bytes_up
        clients = self._admission.refresh(grid, server_round)
        tally = RoundTally()
        roster = self._roster(self._method.learners(clients), server_round)
        phase = self._method.open_round(roster, tally)
        last = server_round == self._method.post.config.run.rounds
        queue = list(roster.nodes.items())
        outcome = self._schedule.run_round(server_round, queue, phase, last=last)
        self._method.close_round(server_round, tally)
        self._evaluate(clients, server_round, tally)
        row: dict[str, float] = {"round": server_round}
        row |= summarise(tally.evaluations)
        row["num_evaluated"] = len(tally.evaluations)
        row |= self._train_row(tally, outcome)
        row["bytes_up"] = self._post.mailbox.bytes_up - up
        row["bytes_down"] = self._post.mailbox.bytes_down - down
        row["seconds_round"] = time.monotonic() - started
        row["seconds_waiting"] = row["seconds_round"] - row["seconds_server"]
        self._folder.note_clients(self._client_rows(tally.evaluations))
        self._ask_misfits_again()
        return row

    def _evaluate(self, clients: list[Client], server_round: int, tally: RoundTally) -> None:
        """Replace what was measured before training by a measurement after it, where asked."""
        run = self._post.config.run
        last = server_round == run.rounds
        due = run.evaluation == "separate" and server_round % run.evaluate_every == 0
        if due or last:
            decode = self._method.decode_evaluation
            tally.evaluations = self._ask(clients, server_round, wire.EVALUATE_PERSONAL, decode)

    def _ask(
        self,
        clients: list[Client],
        server_round: int,
        message_type: str,
        decode: Callable[[RecordDict, str], T],
    ) -> dict[str, T]:
        """Send everyone who is free the newest weights; return the good replies by client_id."""
        roster = self._listed(clients, server_round)
        free = without_busy(roster, self._post.mailbox.busy_nodes())
        return ask_all(self._post, self._method.letters(free, message_type), decode)

    def _train_row(self, tally: RoundTally, outcome: RoundOutcome) -> dict[str, float]:
        return {
            "train_loss": weighted_mean(tally.train_losses.values()),
            "seconds_server": tally.seconds_server,
            "seconds_clients": tally.seconds_clients,
            "num_accepted": len(outcome.accepted),
            "num_failed": len(outcome.failed),
            "num_unanswered": len(outcome.unanswered) + len(outcome.skipped_busy),
            "num_late_used": outcome.late_used,
            "num_late_dropped": outcome.late_dropped,
            "num_too_stale": outcome.too_stale,
            "num_server_steps": outcome.num_steps,
            **mean_diagnostics(tally.diagnostics),
            **global_diagnostics(tally.global_step),
        }

    def _require_enough(self, row: dict[str, float], server_round: int) -> None:
        asked = row["num_accepted"] + row["num_failed"] + row["num_unanswered"]
        needed = self._post.config.schedule.min_fraction * asked
        if row["num_accepted"] < needed:
            self._checkpoint()
            raise RunError(
                f"round {server_round}: {int(row['num_accepted'])} of {int(asked)} clients sent a "
                f"usable update; min-fraction {self._post.config.schedule.min_fraction:g} needs "
                f"{needed:g}. Everything learned so far is in the checkpoint; see the rejected "
                "replies above, then resume with resume-from."
            )

    def _checkpoint(self) -> None:
        save_server(
            self._folder.path,
            self._method,
            self._registry,
            self._folder.rows,
            self._folder.client_rows,
        )

    def _finish(self, grid: Grid, rounds: int) -> None:
        clients = self._registry.present(rounds)
        stored = self._ask(clients, rounds, wire.FINISH, wire.decode_finish_reply)
        places = sorted({place for place in stored.values() if place})
        if places:
            logger.info("Personal models of %d clients stored, e.g. %s", len(stored), places[0])

    def _ask_misfits_again(self) -> None:
        """Have clients register anew whose replies did not fit: perhaps their model changed."""
        for client_id in self._post.desk.misfits & self._registry.clients().keys():
            self._registry.ask_again(client_id)
        self._post.desk.misfits.clear()

    def _roster(self, clients: list[Client], server_round: int) -> Roster:
        """Shuffle the clients: the published algorithm trains them in random order."""
        rng = numpy_generator(self._post.config.run.seed, "client-order", server_round=server_round)
        order = [clients[i] for i in rng.permutation(len(clients))]
        return self._listed(order, server_round)

    def _listed(self, clients: list[Client], server_round: int) -> Roster:
        patience = self._post.config.schedule.round_deadline_s or math.inf
        return Roster(server_round, {c.client_id: c.node_id for c in clients}, patience)

    def _client_rows(self, evaluations: dict[str, Evaluation]) -> list[dict[str, object]]:
        return [
            {
                "client_id": client_id,
                "num_parameters": self._registry.client(client_id).num_parameters,
                **self._method.facts(client_id),
                "num_train": self._registry.client(client_id).num_examples,
                "num_test": evaluation.num_test,
                "correct": evaluation.num_correct,
                "accuracy": evaluation.num_correct / evaluation.num_test,
                **{f"accuracy_{k}": n / evaluation.num_test for k, n in evaluation.others.items()},
                "test_loss": evaluation.test_loss,
                "rejected": self._post.desk.rejected[client_id],
            }
            for client_id, evaluation in evaluations.items()
        ]

    # --- Flower's hooks, as building blocks for a stock strategy loop ----------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Build one `train.personal` message for each client present (`arrays` is not used)."""
        clients = self._method.learners(self._admission.refresh(grid, server_round))
        roster = self._roster(clients, server_round)
        phase = self._method.phase(roster, RoundTally())
        return [_message(letter) for letter in phase.letters(list(roster.nodes))]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take one server step on all good replies (fully parallel round)."""
        roster = self._listed(self._registry.present(server_round), server_round)
        tally = RoundTally()
        phase = self._method.phase(roster, tally)
        updates = [u for a in self._answers(roster, replies) if (u := phase.accept(a)) is not None]
        if not updates:
            return None, None
        phase.step(updates)
        return None, MetricRecord({"train_loss": weighted_mean(tally.train_losses.values())})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Build one `evaluate.personal` message for each client present."""
        roster = self._listed(self._registry.present(server_round), server_round)
        return [_message(x) for x in self._method.letters(roster, wire.EVALUATE_PERSONAL)]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Summarise test counts over clients."""
        roster = self._listed(self._registry.present(server_round), server_round)
        decode = self._method.decode_evaluation
        found = {
            answer.ticket.client_id: evaluation
            for answer in self._answers(roster, replies)
            if (evaluation := self._post.desk.read(answer, decode)) is not None
        }
        return MetricRecord(dict(summarise(found))) if found else None

    def _answers(self, roster: Roster, replies: Iterable[Message]) -> list[Answer]:
        client_of = {node: client_id for client_id, node in roster.nodes.items()}
        return [
            Answer(
                roster.ticket(client_of[m.metadata.src_node_id], wire.TRAIN_PERSONAL),
                None if m.has_error() else m.content,
                failure=m.error.reason or "error" if m.has_error() else "",
            )
            for m in replies
            if m.metadata.src_node_id in client_of
        ]

    def _nothing_left(self, rounds: int) -> None:
        """Say that a resumed run is over; its models may still have to be handed out."""
        message = (
            f"The checkpoint is of round {self._first_round - 1} and rounds = {rounds}: no round "
            f"is left. rounds counts from the very beginning; set it above {self._first_round - 1}."
        )
        if self._post.config.run.novel_only:
            raise ConfigError(message)
        logger.warning("%s Final models are handed out, nothing else.", message)

    def summary(self) -> None:
        """Log what is about to run."""
        config = self._post.config
        logger.info(
            "%s: rounds %d-%d, max-in-flight %s, buffer-size %s, seed %d",
            config.run.method,
            self._first_round,
            config.run.rounds,
            config.schedule.max_in_flight or "all",
            config.schedule.buffer_size or "= max-in-flight",
            config.run.seed,
        )


def _message(letter: Letter) -> Message:
    return Message(letter.content, letter.ticket.node_id, letter.ticket.message_type)
