"""MH-pFedHN and MH-pFedHNGD (arXiv 2507.22330): the server half.

Generate every client's parameters; pull the changes that come back through the hypernetwork. GD
adds a global model w_g, generated from an embedding of its own, that all clients train and distil
from: in a message of its own before the personal one, as published, or in the same (`gd-mode`).
PG gives every client a personal common model w_i in its place. Differs from paper: there is one for
all, and a client predicts with its own model alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.compression import Float32
from common.config import RunConfig
from common.errors import RunError
from common.log import logger
from common.messages import (
    DELTA,
    DISTIL,
    GLOBAL_DELTA,
    GLOBAL_THETA,
    MOST_WEIGHT,
    THETA,
    TRAIN_GLOBAL,
    bounded_counts,
)
from common.records import Content, Received, require_norm
from server_app.aggregation import make_network, make_rule, server_device
from server_app.aggregation.base import StepDiagnostics, global_diagnostics
from server_app.clients import GLOBAL_ID, Client
from server_app.hypernet.groups import NormClip, Update, group_order
from server_app.methods.base import Exchange, Method, Upload

SHARED = f"0-{GLOBAL_ID}"
"""As whose the norms of w_g's deltas are kept."""


@dataclass(frozen=True)
class Deltas:
    """The changes of a client's personal model (K_i,), and where it trained it of w_g (K_g,)."""

    personal: Float32
    shared: Float32 | None = None


class MHpFedHN(Method[Deltas]):
    """Hosts the hypernetwork and the rule that moves it.

    Attributes
    ----------
    hypernet, rule, clip : network, update rule, and the clip of deltas to their group's median.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        device = server_device(config.run.server_device)
        rule, seed = config.update.server_rule, config.run.seed
        self.hypernet = make_network(rule, config.hypernet, seed=seed, device=device)
        self.rule = make_rule(self.hypernet, config.update, total_rounds=config.run.rounds)
        # with a bound of its own, no delta's length may depend on the others'
        fixed = config.update.user_dp_noise > 0
        self.clip = NormClip(0.0 if fixed else config.schedule.clip_to_median)
        self._frozen_clients: set[str] = set()
        self._global_theta: Float32 | None = None
        self._global_uploads: dict[str, Upload[Float32]] = {}
        self._global_step: StepDiagnostics | None = None
        self._holders: set[str] = set()  # clients that have this round's w_g already
        self._server_round = 0
        self._distils, self.distill_keys = config.has_global_model, config.distill.flat()
        # w_g does not learn when only new clients do
        trains = config.has_global_model and not config.run.novel_only
        self._separate = trains and config.exchanges_first
        self._fused = trains and not config.exchanges_first

    # --- who takes part --------------------------------------------------------------------------

    def add_client(self, client: Client) -> None:
        """Give a client an embedding of its size, unless it has one; GD: v_g with the first."""
        hypernet, client_id, tag = self.hypernet, client.client_id, client.group
        if hypernet.has_client(client_id):
            if hypernet.is_same(client_id, client.num_parameters, tag):
                return
            self._drop(client_id)
        hypernet.add_client(client_id, client.num_parameters, tag=tag)
        if self.config.has_global_model and not hypernet.has_client(GLOBAL_ID):
            hypernet.add_client(GLOBAL_ID, client.num_global_parameters, tag=GLOBAL_ID)

    def forget_client(self, client_id: str) -> None:
        """Drop its embedding, its own vector, its norms, and those of its common model."""
        for name in filter(self.hypernet.has_client, (client_id, common_id(client_id))):
            self._drop(name)

    def _drop(self, name: str) -> None:
        self.hypernet.remove_client(name)
        self.rule.free_unused()
        self.clip.forget(name)
        self._frozen_clients.discard(name)

    def learners(self, clients: list[Client]) -> list[Client]:
        """Return those who train: everybody, or in a novel-only run the new clients alone."""
        learners = [c for c in clients if c.client_id not in self._frozen_clients]
        if not learners:
            raise RunError(
                f"novel-only, but all {len(clients)} clients that are present are part of the "
                "checkpoint. Start the new clients before the run, or set novel-only = false."
            )
        return learners

    # --- what is sent ----------------------------------------------------------------------------

    def open_round(self, server_round: int, clients: Sequence[Client], exchange: Exchange) -> None:
        """Generate w_g; with messages of its own send it, and learn from the replies."""
        self._server_round = server_round
        self._holders, self._global_uploads, self._global_step = set(), {}, None
        if not self._distils:
            return
        ((_, self._global_theta),) = self.hypernet.thetas([GLOBAL_ID])
        if self._separate:
            content = Content({TRAIN_GLOBAL: True}, {GLOBAL_THETA: self._global_theta})
            uploads = exchange(((client, content) for client in clients), self._read_global)
            self._holders = {upload.client.client_id for upload in uploads}
            self._global_uploads = {upload.client.client_id: upload for upload in uploads}
            self._learn_global(server_round - 1.0)

    def contents(self, clients: Sequence[Client], *, training: bool) -> Iterator[Content]:
        """Generate theta with the phi of the moment; to train, w_g goes to whoever lacks it."""
        settings: dict[str, Any] = {}
        if training and self._distils:
            settings = {TRAIN_GLOBAL: self._fused, DISTIL: True, **self.distill_keys}
        for client_id, theta in self.hypernet.thetas([client.client_id for client in clients]):
            arrays = {THETA: theta}
            if settings and self._global_theta is not None and client_id not in self._holders:
                arrays[GLOBAL_THETA] = self._global_theta
            yield Content(settings, arrays)

    # --- what is accepted ------------------------------------------------------------------------

    def read(self, client: Client, reply: Received) -> Deltas:
        """Read the client's delta, and that of w_g where it was asked for."""
        shared = self._read_global(client, reply) if self._fused else None
        size = self.hypernet.num_parameters(client.client_id)
        return Deltas(self.delta(reply, DELTA, size), shared)

    def _read_global(self, client: Client, reply: Received) -> Float32:
        return self.delta(reply, GLOBAL_DELTA, self.hypernet.num_parameters(GLOBAL_ID))

    def delta(self, reply: Received, name: str, size: int) -> Float32:
        """Read a change (size,) that is not absurdly large; raise WireError where there is none."""
        delta = reply.vector(name, size, top_k=self.config.wire.uplink_top_k)
        require_norm(delta, name, self.max_norm)
        return delta

    # --- what is learned -------------------------------------------------------------------------

    def learn(
        self, uploads: Sequence[Upload[Deltas]], *, server_round: int, progress: float
    ) -> StepDiagnostics:
        """Take one step of the rule along J^T delta of these clients."""
        for upload in uploads:
            if (shared := upload.content.shared) is not None:
                found = Upload(upload.client, upload.num_examples, shared, upload.staleness)
                self._global_uploads[upload.client.client_id] = found
        updates = [update for upload in uploads for update in self.updates(upload)]
        usual = self.clip.clip_all(updates, self.hypernet.group_key, self.hypernet.num_sharing)
        return self.rule.step(usual, progress=progress)

    def updates(self, upload: Upload[Deltas]) -> list[Update]:
        """Return what the rule's step gets from one upload."""
        delta = torch.from_numpy(upload.content.personal)
        return [Update(upload.client.client_id, delta, staleness=upload.staleness)]

    def close_round(self) -> dict[str, float]:
        """Fused GD: one step for w_g, from the deltas that came with the personal ones."""
        if self._fused:
            self._learn_global(float(self._server_round))
        return {**global_diagnostics(self._global_step), **self.rule.privacy_row()}

    def _learn_global(self, progress: float) -> None:
        """Take ONE server step on sum_i (n_i / sum n) J_g^T delta_g,i (method.md, Phase 1)."""
        uploads = list(self._global_uploads.values())
        if not uploads:
            return
        weights = bounded_counts([u.num_examples for u in uploads], MOST_WEIGHT)
        updates = [
            Update(upload.client.client_id, torch.from_numpy(upload.content), weight)
            for upload, weight in zip(uploads, weights, strict=True)
        ]
        usual = self.clip.clip_all(updates, lambda _: SHARED)  # everybody's: never of one alone
        self._global_step = self.rule.step_global(GLOBAL_ID, usual, progress=progress)
        self.num_steps += 1

    # --- what is saved ---------------------------------------------------------------------------

    def keep_releases(self, folder: Path, *earlier: Path) -> None:
        """See `Method.keep_releases`."""
        if self.rule.privacy:
            self.rule.privacy.keep_in(folder, *earlier)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return phi, embeddings and the state of the rule and of the clip."""
        phi, network = self.hypernet.state_dict()
        state, rule = self.rule.state_dict()
        frozen = None
        if self.config.run.novel_only:
            groups = sorted(self.rule.frozen_groups, key=group_order)
            frozen = {"clients": sorted(self._frozen_clients), "groups": groups}
        facts = {"hypernet": network, "update": rule, "norms": self.clip.export()}
        return phi | state, facts | {"frozen": frozen}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load them into an empty hypernetwork; novel-only freezes what is there."""
        self.hypernet.load_state_dict(tensors, facts["hypernet"])
        self.rule.load_state_dict(tensors, facts["update"])
        self.clip.restore(facts["norms"])
        if self.config.run.novel_only:
            self._freeze(facts["frozen"])

    def _freeze(self, before: Mapping[str, Any] | None) -> None:
        """Freeze all there is; a novel-only run that is resumed freezes what it froze before."""
        hypernet = self.hypernet
        self._frozen_clients |= set(before["clients"] if before else hypernet.clients())
        self.rule.freeze(map(str, before["groups"]) if before else hypernet.groups)
        logger.info(
            "%d head groups and %d embeddings are frozen: only new clients learn",
            len(self.rule.frozen_groups),
            len(self._frozen_clients),
        )

    def facts(self, client: Client) -> dict[str, object]:
        """Return the client's number of chunks, and its head group where that says more."""
        hypernet, client_id = self.hypernet, client.client_id
        facts: dict[str, object] = {"num_chunks": hypernet.num_chunks(client_id)}
        if hypernet.section.head_sharing != "chunks":
            facts["head_group"] = hypernet.group_key(client_id)
        return facts


def common_id(client_id: str) -> str:
    """Return the name of a client's common model in the hypernetwork; no client is called so."""
    return f"{GLOBAL_ID}/{client_id}"


class MHpFedHNPG(MHpFedHN):
    """MH-pFedHN-PG (docs/method.md): two embeddings a client, of its own and its common model.

    All common models have one small architecture and share one head group, whatever the clients'
    own architectures are: through it everybody learns from everybody.
    """

    def add_client(self, client: Client) -> None:
        """Give a client both embeddings, unless it has them; the common one survives its model."""
        super().add_client(client)
        name, size = common_id(client.client_id), client.num_global_parameters
        if not self.hypernet.has_client(name):
            self.hypernet.add_client(name, size, group=GLOBAL_ID)

    def contents(self, clients: Sequence[Client], *, training: bool) -> Iterator[Content]:
        """Generate both models with the phi of the moment."""
        trains = {TRAIN_GLOBAL: True, DISTIL: True, **self.distill_keys} if training else {}
        own = self.hypernet.thetas([client.client_id for client in clients])
        common = self.hypernet.thetas([common_id(client.client_id) for client in clients])
        for (_, theta), (_, shared) in zip(own, common, strict=True):
            yield Content(trains, {THETA: theta, GLOBAL_THETA: shared})

    def read(self, client: Client, reply: Received) -> Deltas:
        """Read the changes of both models."""
        size = self.hypernet.num_parameters
        own = self.delta(reply, DELTA, size(client.client_id))
        shared = self.delta(reply, GLOBAL_DELTA, size(common_id(client.client_id)))
        return Deltas(own, shared)

    def updates(self, upload: Upload[Deltas]) -> list[Update]:
        """Return an update for each of the two embeddings."""
        assert upload.content.shared is not None  # `read` made it
        name, delta = common_id(upload.client.client_id), torch.from_numpy(upload.content.shared)
        return [*super().updates(upload), Update(name, delta, staleness=upload.staleness)]
