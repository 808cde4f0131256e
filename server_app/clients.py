"""Who is who: a stable client_id, the node it runs on at the moment, its key, its counts.

An embedding belongs to a client, not to a connection. The registry is refreshed at the top of
every round, so clients join, leave and return at any time. Where nodes have keys, a client_id
belongs to the key that first used it, across restarts of the node and of the server.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.errors import RegistrationError
from common.log import logger
from common.wire import Registration

GLOBAL_ID = "__global__"
"""Key of the global model's embedding v_g; no client may register under it."""

NOWHERE = 0
"""Node id of a client that is not here; Flower gives it to no node."""

RETRY_S = 15.0
"""Seconds until a node that failed to register is asked again."""

LONGEST_RETRY_ROUNDS = 16
"""A node that does not say who it is gets asked again after 1, 2, 4, ... rounds, at most these."""


@dataclass(frozen=True)
class Client:
    """One participant as the server knows it.

    `num_parameters` is the paper's K_i; `key` the fingerprint of the SuperNode key that the
    client_id is bound to, "" where it is bound to none. The last three as in `Registration`.
    """

    client_id: str
    node_id: int
    num_parameters: int
    num_examples: int
    num_global_parameters: int
    last_seen_round: int
    key: str = ""
    group: str = ""
    num_classes: int = 0
    feature_dim: int = 0


Rule = Callable[[Registration, Collection[Client]], None]


@dataclass(frozen=True)
class NodeKey:
    """The key that a node proved to hold, and whether a client_id is bound to it on first use."""

    fingerprint: str
    binds: bool


@dataclass(frozen=True)
class Refusal:
    """Why a node is not admitted, and when to ask it again.

    `holder` is the node that has to go offline first; `until_round` the round to ask again in.
    """

    reason: str
    holder: int | None = None
    until_round: int | None = None


def fingerprint(public_key: bytes) -> str:
    """Return a short name of a public key: SHA-256, in hex, of which 16 bytes are shown."""
    return "SHA256:" + hashlib.sha256(public_key).hexdigest()[:32] if public_key else ""


def natural_key(client_id: str) -> list[tuple[int, int, str]]:
    """Sort key that puts client 10 after client 9."""
    parts = re.split(r"(\d+)", client_id)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


class Registry:
    """Maps client_id to node_id and back; refuses what would break identity.

    Parameters
    ----------
    max_parameters : cap on K_i, checked before any head is built for it.
    rule : what the method demands beyond that; raises RegistrationError. Given the registration
        and everyone else who ever registered.
    """

    def __init__(self, max_parameters: int, rule: Rule | None = None) -> None:
        self._max_parameters = max_parameters
        self._rule = rule
        self._clients: dict[str, Client] = {}
        self._known_nodes: set[int] = set()
        self._refused: dict[int, Refusal] = {}
        self._silences: Counter[int] = Counter()
        self._failed_at: dict[int, float] = {}
        self._online: set[int] = set()

    def unknown_nodes(self, online: Iterable[int], server_round: int) -> list[int]:
        """Note who is online; return the nodes that have to be asked who they are."""
        before, self._online = self._online, set(online)
        self._refused = {n: r for n, r in self._refused.items() if self._stands(n, r, server_round)}
        self._known_nodes &= before & self._online
        resting = {n for n, at in self._failed_at.items() if time.monotonic() - at < RETRY_S}
        return sorted(self._online - self._known_nodes - self._refused.keys() - resting)

    def note_failure(self, node_id: int) -> None:
        """Leave a node alone for `RETRY_S`: it could not say who it is."""
        self._failed_at[node_id] = time.monotonic()

    def _stands(self, node_id: int, refusal: Refusal, server_round: int) -> bool:
        freed = refusal.holder is not None and refusal.holder not in self._online
        due = refusal.until_round is not None and server_round >= refusal.until_round
        return node_id in self._online and not freed and not due

    def ask_again(self, client_id: str) -> None:
        """Have a client's node register anew at the next refresh (its replies do not fit)."""
        self._known_nodes.discard(self._clients[client_id].node_id)

    def note_silence(self, node_id: int, reason: str, server_round: int) -> None:
        """Note that a node did not say who it is; each time it is left alone for longer."""
        self._silences[node_id] += 1
        pause = min(2 ** (self._silences[node_id] - 1), LONGEST_RETRY_ROUNDS)
        self._refused[node_id] = Refusal(reason, until_round=server_round + pause)

    def admit(
        self,
        node_id: int,
        registration: Registration,
        server_round: int,
        *,
        key: NodeKey | None = None,
    ) -> Client | None:
        """Take a node's answer to `query.register`; a refused one is logged and returns None.

        Parameters
        ----------
        key : the node's key; None where keys do not count, which also undoes a binding.

        Returns
        -------
        The client as it is now known. Its K_i may differ from the one before: the caller then
        gives it a fresh embedding.
        """
        try:
            self._check(node_id, registration, key)
        except RegistrationError as error:
            holder = self._live_holder(node_id, registration.client_id)
            self._refused[node_id] = Refusal(str(error), holder)
            logger.error("Refused: %s", error)
            return None
        client = Client(
            client_id=registration.client_id,
            node_id=node_id,
            num_parameters=registration.num_parameters,
            num_examples=registration.num_examples,
            num_global_parameters=registration.num_global_parameters,
            last_seen_round=server_round,
            key=self._binding(registration.client_id, key),
            group=registration.group,
            num_classes=registration.num_classes,
            feature_dim=registration.feature_dim,
        )
        self._log_change(self._clients.get(client.client_id), client)
        self._vacate(node_id)
        self._clients[client.client_id] = client
        self._known_nodes.add(node_id)
        return client

    def _vacate(self, node_id: int) -> None:
        """A node speaks for one client: whoever it was before is elsewhere or gone."""
        for client_id, client in self._clients.items():
            if client.node_id == node_id:
                self._clients[client_id] = replace(client, node_id=NOWHERE)

    def _check(self, node_id: int, registration: Registration, key: NodeKey | None) -> None:
        client_id = registration.client_id
        who = f"client {client_id} (node {node_id})"
        if client_id == GLOBAL_ID or not client_id.isprintable():
            raise RegistrationError(
                f"node {node_id} calls itself {client_id!r}: a client-id has printable characters "
                f"only and is not {GLOBAL_ID!r}, which names the global model. Choose another."
            )
        if registration.num_parameters > self._max_parameters:
            raise RegistrationError(
                f"{who} declares {registration.num_parameters:,} parameters; at most "
                f"{self._max_parameters:,} are accepted. Use a smaller model, or raise "
                "max-parameters on the server (heads take 129 floats for each parameter)."
            )
        self._check_global(who, registration)
        if self._rule is not None:
            self._rule(
                registration, [c for c in self._clients.values() if c.client_id != client_id]
            )
        self._check_key(who, client_id, key)
        holder = self._live_holder(node_id, client_id)
        if holder is not None:
            raise RegistrationError(
                f"{who} claims a client-id that node {holder} holds and is online with. "
                "Two participants cannot share one identity: give each its own client-id."
            )

    def _live_holder(self, node_id: int, client_id: str) -> int | None:
        """Return the other node that is online as this client, if any."""
        current = self._clients.get(client_id)
        taken = current and current.node_id != node_id and current.node_id in self._online
        return current.node_id if current and taken else None

    def _binding(self, client_id: str, key: NodeKey | None) -> str:
        current = self._clients.get(client_id)
        bound = key is not None and (key.binds or (current is not None and current.key != ""))
        return key.fingerprint if key is not None and bound else ""

    def _check_key(self, who: str, client_id: str, key: NodeKey | None) -> None:
        if key is None:
            return
        current = self._clients.get(client_id)
        if current and current.key and current.key != key.fingerprint:
            raise RegistrationError(
                f"{who} presents key {key.fingerprint or 'none'}, but this client-id belongs to "
                f"the key that first used it, {current.key}. An impostor, or a participant with a "
                'new key: then resume once with client-keys = "ignore", to bind all anew later.'
            )
        owners = [c for c in self._clients.values() if c.key and c.key == key.fingerprint]
        other = next((c for c in owners if c.client_id != client_id), None)
        if other is not None:
            raise RegistrationError(
                f"{who} presents key {key.fingerprint}, which belongs to client "
                f"{other.client_id}. One key is one participant: keep the client-id, or register "
                "a key of its own."
            )

    def _check_global(self, who: str, registration: Registration) -> None:
        agreed = next((c.num_global_parameters for c in self._clients.values()), None)
        if agreed is not None and registration.num_global_parameters != agreed:
            raise RegistrationError(
                f"{who} builds a global model of {registration.num_global_parameters:,} "
                f"parameters; the federation's has {agreed:,}. All clients need the same "
                "global-model, number of classes and input channels."
            )

    def _log_change(self, before: Client | None, now: Client) -> None:
        if before is None:
            logger.info(
                "Client %s joined (%s parameters)", now.client_id, f"{now.num_parameters:,}"
            )
        elif before.num_parameters != now.num_parameters:
            logger.warning(
                "Client %s changed from %s to %s parameters: it starts with a new embedding",
                now.client_id,
                f"{before.num_parameters:,}",
                f"{now.num_parameters:,}",
            )
        elif before.node_id != now.node_id:
            logger.info("Client %s is back, on node %s", now.client_id, now.node_id)

    def present(self, server_round: int) -> list[Client]:
        """Return the clients that are online now, in natural order of client_id."""
        for client_id, client in self._clients.items():
            if client.node_id in self._known_nodes:
                self._clients[client_id] = replace(client, last_seen_round=server_round)
        here = [c for c in self._clients.values() if c.node_id in self._known_nodes]
        return sorted(here, key=lambda c: natural_key(c.client_id))

    def client(self, client_id: str) -> Client:
        """Return a client that has registered before."""
        return self._clients[client_id]

    def clients(self) -> Mapping[str, Client]:
        """Return everyone who ever registered."""
        return self._clients

    def export(self) -> list[dict[str, Any]]:
        """Return everyone who ever registered, as JSON-able facts for a checkpoint."""
        return [asdict(client) for client in self._clients.values()]

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Load exported clients; each is present again once its node has registered."""
        clients = (replace(Client(**row), node_id=NOWHERE) for row in saved)
        self._clients = {client.client_id: client for client in clients}

    def refusals(self) -> list[str]:
        """Return the reasons of the nodes that are online and were refused."""
        return [self._refused[node].reason for node in sorted(self._refused)]
