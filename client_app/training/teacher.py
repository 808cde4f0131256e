"""The round's teacher: the w_g that a client trained in the trip before (MH-pFedHNGD)."""

from __future__ import annotations

import torch

from client_app.store import ClientState
from common.compression import Float32
from common.errors import WireError
from common.wire import Header

TEACHER = "teacher"


def keep_teacher(state: ClientState, theta: Float32, server_round: int) -> None:
    """Keep w_g (K_g,) as it was sent in a round."""
    stamped = {"theta": torch.from_numpy(theta), "round": torch.tensor(server_round)}
    state.save(TEACHER, stamped)


def kept_teacher(state: ClientState, server_round: int) -> Float32 | None:
    """Return the w_g (K_g,) of this round; None where there is none, or one of another round."""
    kept = state.load(TEACHER)
    if kept is None or int(kept["round"]) != server_round:
        return None
    theta: Float32 = kept["theta"].numpy()
    return theta


def required_teacher(theta: Float32 | None, header: Header, source: str) -> Float32:
    """Return the teacher's weights; raise WireError where they are not known."""
    if theta is None:
        raise WireError(
            f"{source}: there is no teacher for round {header.server_round}. The "
            "server sends w_g to clients that did not train it; give this client a "
            "state-dir if it restarts within a round."
        )
    return theta
