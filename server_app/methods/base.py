"""What the rounds ask of a method: the hooks that MH-pFedHN and every baseline fill in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from flwr.app import RecordDict
from torch import Tensor

from common.wire import Evaluation, Registration
from server_app.clients import Client
from server_app.scheduler import RoundActions
from server_app.transport import Letter
from server_app.trips import Post, Roster, RoundTally


class Method(Protocol):
    """The server half of a method: what goes out, what is learned from what comes back."""

    @property
    def post(self) -> Post:
        """The way to the clients."""

    def require(self, registration: Registration, source: str) -> None:
        """Raise WireError when a registration lacks something that this method needs."""

    def welcome(self, client: Client) -> None:
        """Take note of a client that was just admitted: new, back, or with another model."""

    def learners(self, clients: list[Client]) -> list[Client]:
        """Return those who train.

        Raises
        ------
        RunError
            Nobody does.
        """

    def open_round(self, roster: Roster, tally: RoundTally) -> RoundActions[Any]:
        """Do what comes before the personal training, trips included; return that training."""

    def phase(self, roster: Roster, tally: RoundTally) -> RoundActions[Any]:
        """Return the personal training of a round without any trip of its own."""

    def close_round(self, server_round: int, tally: RoundTally) -> None:
        """Fold in what is left over when everybody has answered."""

    def letters(self, roster: Roster, message_type: str) -> Iterator[Letter]:
        """Make everyone's message for evaluation or finish, lazily."""

    def decode_evaluation(self, content: RecordDict, source: str) -> Evaluation:
        """Decode and check a reply to `evaluate.personal`."""

    def facts(self, client_id: str) -> dict[str, object]:
        """Return columns of clients.csv that only this method knows."""

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the learning state: tensors, and JSON-able facts."""

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load an exported state.

        Raises
        ------
        CheckpointError
            It does not fit.
        """
