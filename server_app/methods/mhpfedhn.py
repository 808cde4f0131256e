"""MH-pFedHN and MH-pFedHNGD (arXiv 2507.22330): what their rounds send, fold and save.

One round reads like the paper: (GD) train and fold w_g; generate and train the personal models;
pull their changes back through the hypernetwork. It knows counts and vectors, no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from common import wire
from common.errors import RunError, WireError
from common.log import logger
from common.wire import Evaluation, Registration
from server_app.clients import GLOBAL_ID, Client
from server_app.hypernet.groups import group_order
from server_app.methods.phases import Core, GlobalPhase, PersonalPhase, fold_global, theta_letters
from server_app.transport import Letter
from server_app.trips import Post, Roster, RoundTally, without_busy


class MHpFedHN:
    """Hosts the hypernetwork; one `server_app.methods.base.Method`.

    Parameters
    ----------
    core : hypernetwork, its optimiser, the mailbox to the clients.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def post(self) -> Post:
        """The way to the clients."""
        return self._core

    # --- who takes part --------------------------------------------------------------------------

    def require(self, registration: Registration, source: str) -> None:
        """Raise WireError when GD runs and the client names no global model of a sane size."""
        config = self._core.config
        cap = config.hypernet.max_parameters
        if config.distils and not 1 <= registration.num_global_parameters <= cap:
            raise WireError(
                f"{source}: num-global-parameters = {registration.num_global_parameters}; with "
                f"{config.run.method} 1 to {cap:,} are accepted. Start the client with "
                "the run config of this federation."
            )
        if config.hypernet.head_sharing == "tag" and not registration.group:
            raise WireError(
                f"{source}: there is no tag, and head-sharing = 'tag' groups clients by it. Start "
                "the client with the run config of this federation."
            )

    def welcome(self, client: Client) -> None:
        """Give a client an embedding of its size, unless it has one; GD: v_g with the first."""
        hypernet, client_id, tag = self._core.hypernet, client.client_id, client.group
        if hypernet.has_client(client_id):
            if hypernet.is_same(client_id, client.num_parameters, tag):
                return
            hypernet.remove_client(client_id)
            self._core.frozen_clients.discard(client_id)
        hypernet.add_client(client_id, client.num_parameters, tag=tag)
        if self._core.config.distils and not hypernet.has_client(GLOBAL_ID):
            hypernet.add_client(GLOBAL_ID, client.num_global_parameters, tag=GLOBAL_ID)

    def learners(self, clients: list[Client]) -> list[Client]:
        """Return those who train: everybody, or in a novel-only run the new clients alone."""
        learners = [c for c in clients if c.client_id not in self._core.frozen_clients]
        if not learners:
            raise RunError(
                f"novel-only, but all {len(clients)} clients that are present are part of the "
                "checkpoint. Start the new clients before the run, or set novel-only = false."
            )
        return learners

    # --- a round ---------------------------------------------------------------------------------

    def open_round(self, roster: Roster, tally: RoundTally) -> PersonalPhase:
        """Run phase 1 of GD where it is a trip of its own; return the personal phase."""
        core = self._core
        if not core.config.distils:
            return PersonalPhase(core, roster, tally)
        theta = core.generate([GLOBAL_ID])[GLOBAL_ID]
        if core.trains_global and core.config.distill.gd_mode == "separate":
            free = without_busy(roster, core.mailbox.busy_nodes())
            GlobalPhase(core, free, tally, theta).run()
        return PersonalPhase(core, roster, tally, theta, frozenset(tally.global_deltas))

    def phase(self, roster: Roster, tally: RoundTally) -> PersonalPhase:
        """Return the personal phase; with GD everyone gets w_g along with theta."""
        theta = self._core.generate([GLOBAL_ID])[GLOBAL_ID] if self._core.config.distils else None
        return PersonalPhase(self._core, roster, tally, theta)

    def close_round(self, server_round: int, tally: RoundTally) -> None:
        """Fused GD: one server step for w_g, from the deltas that came with the personal ones."""
        if self._core.trains_global and self._core.config.distill.gd_mode == "fused":
            fold_global(self._core, tally, progress=float(server_round))

    def letters(self, roster: Roster, message_type: str) -> Iterator[Letter]:
        """Generate fresh weights for evaluation or finish: no local fine-tuning comes between."""
        return theta_letters(self._core, roster, message_type)

    def decode_evaluation(self, content: RecordDict, source: str) -> Evaluation:
        """Decode test counts."""
        return wire.decode_evaluation(content, source)

    def facts(self, client_id: str) -> dict[str, object]:
        """Return the client's number of chunks, and its head group where that says more."""
        hypernet = self._core.hypernet
        facts: dict[str, object] = {"num_chunks": hypernet.num_chunks(client_id)}
        if hypernet.section.head_sharing != "chunks":
            facts["head_group"] = hypernet.bank.key(client_id)
        return facts

    # --- checkpoints -----------------------------------------------------------------------------

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export phi, embeddings and Adam's state."""
        phi, hypernet_meta = self._core.hypernet.state_dict()
        adam, update_meta = self._core.update.state_dict()
        meta = {
            "hypernet": hypernet_meta,
            "update": update_meta,
            "norms": self._core.norms.export(),
            "frozen": self._frozen(),
        }
        return phi | adam, meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load an exported state into an empty hypernetwork; novel-only freezes it."""
        self._core.hypernet.load_state_dict(tensors, meta["hypernet"])
        self._core.update.load_state_dict(tensors, meta["update"])
        self._core.norms.restore(meta["norms"])
        if self._core.config.run.novel_only:
            self._freeze(meta["frozen"])

    def _frozen(self) -> dict[str, Any] | None:
        if not self._core.config.run.novel_only:
            return None
        groups = sorted(self._core.update.frozen_groups, key=group_order)
        return {"clients": sorted(self._core.frozen_clients), "groups": groups}

    def _freeze(self, before: Mapping[str, Any] | None) -> None:
        """Freeze all there is; a novel-only run that is resumed freezes what it froze before."""
        core = self._core
        core.frozen_clients |= set(before["clients"] if before else core.hypernet.clients())
        core.update.freeze(map(str, before["groups"]) if before else core.hypernet.groups)
        logger.info(
            "Trunk, %d head groups and %d embeddings are frozen: only new clients learn",
            len(core.update.frozen_groups),
            len(core.frozen_clients),
        )
