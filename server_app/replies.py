"""Accepts or rejects what clients send, with the reason. A reply can never crash the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from flwr.app import RecordDict

from common.compression import Float32
from common.errors import MHpFedHNError, WireError
from common.log import logger
from common.wire import TrainReply
from server_app.transport import Answer

T = TypeVar("T")


class ReplyDesk:
    """Decodes answers, logs and counts those that are no good.

    Attributes
    ----------
    rejected : number of rejected or failed answers by client_id, over the whole run.
    recent : the last ten reasons.
    misfits : clients whose content did not fit what they registered, since the last `clear`.
    """

    def __init__(self, max_delta_norm: float) -> None:
        self._max_delta_norm = max_delta_norm
        self.rejected: Counter[str] = Counter()
        self.recent: list[str] = []
        self.misfits: set[str] = set()

    def read(self, answer: Answer, decode: Callable[[RecordDict, str], T]) -> T | None:
        """Decode a good answer; log and count a bad one and return None."""
        source = answer.ticket.source
        if answer.content is None:
            self.reject(answer, f"{source}: {answer.failure}")
            return None
        try:
            return decode(answer.content, source)
        except MHpFedHNError as error:
            self.misfits.add(answer.ticket.client_id)
            self.reject(answer, str(error))
            return None

    def read_training(
        self, answer: Answer, decode: Callable[[RecordDict, str], TrainReply]
    ) -> TrainReply | None:
        """Decode a training answer as `read` does; one about another round is no good either."""

        def decode_and_compare(content: RecordDict, source: str) -> TrainReply:
            reply, asked = decode(content, source), answer.ticket.server_round
            if reply.server_round != asked:
                raise WireError(
                    f"{source}: the delta is of round {reply.server_round}; expected round "
                    f"{asked}, which the message asked for. The client repeats an old answer."
                )
            return reply

        return self.read(answer, decode_and_compare)

    def check_norm(self, x: Float32, name: str, source: str) -> None:
        """Raise WireError when the Euclidean norm of a delta is beyond `max-delta-norm`."""
        norm = float(np.linalg.norm(x.astype(np.float64)))
        if norm > self._max_delta_norm:
            raise WireError(
                f"{source}: {name} has norm {norm:.3g}; at most {self._max_delta_norm:.3g} is "
                "accepted (max-delta-norm). Training diverged there, or the client is faulty."
            )

    def reject(self, answer: Answer, reason: str) -> None:
        """Log and count an answer that is not used."""
        self.rejected[answer.ticket.client_id] += 1
        short = _shortened(" ".join(reason.split()))
        self.recent = [*self.recent[-9:], short]
        logger.warning("Rejected: %s", short)


def _shortened(reason: str) -> str:
    """Cut a long reason in the middle: its start says who, and Ray puts the cause last."""
    return reason if len(reason) <= 1000 else f"{reason[:300]} ... {reason[-700:]}"
