"""Who is who: a stable client_id, the node it runs on at the moment, its counts.

An embedding belongs to a client, not to a connection. The registry is refreshed at the top of
every round, so clients join, leave and return at any time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.errors import RegistrationError
from common.log import logger
from common.wire import Registration

RETRY_S = 15.0
"""Seconds until a node that failed to register is asked again."""


@dataclass(frozen=True)
class Client:
    """One participant as the server knows it. `num_parameters` is the paper's K_i."""

    client_id: str
    node_id: int
    num_parameters: int
    num_examples: int
    num_global_parameters: int
    last_seen_round: int


def natural_key(client_id: str) -> list[tuple[int, int, str]]:
    """Sort key that puts client 10 after client 9."""
    parts = re.split(r"(\d+)", client_id)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


class Registry:
    """Maps client_id to node_id and back; refuses what would break identity.

    Parameters
    ----------
    max_parameters : cap on K_i, checked before any head is built for it.
    """

    def __init__(self, max_parameters: int) -> None:
        self._max_parameters = max_parameters
        self._clients: dict[str, Client] = {}
        self._known_nodes: set[int] = set()
        self._refused: dict[int, str] = {}
        self._failed_at: dict[int, float] = {}
        self._online: set[int] = set()

    def unknown_nodes(self, online: Iterable[int]) -> list[int]:
        """Note who is online; return the nodes that have to be asked who they are."""
        before, self._online = self._online, set(online)
        self._refused = {n: why for n, why in self._refused.items() if n in self._online}
        self._known_nodes &= before & self._online
        resting = {n for n, at in self._failed_at.items() if time.monotonic() - at < RETRY_S}
        return sorted(self._online - self._known_nodes - self._refused.keys() - resting)

    def note_failure(self, node_id: int) -> None:
        """Leave a node alone for `RETRY_S`: it could not say who it is."""
        self._failed_at[node_id] = time.monotonic()

    def ask_again(self, client_id: str) -> None:
        """Have a client's node register anew at the next refresh (its replies do not fit)."""
        self._known_nodes.discard(self._clients[client_id].node_id)

    def admit(self, node_id: int, registration: Registration, server_round: int) -> Client | None:
        """Take a node's answer to `query.register`; a refused one is logged and returns None.

        Returns
        -------
        The client as it is now known. Its K_i may differ from the one before: the caller then
        gives it a fresh embedding.
        """
        try:
            self._check(node_id, registration)
        except RegistrationError as error:
            self._refused[node_id] = str(error)
            logger.error("Refused: %s", error)
            return None
        client = Client(
            client_id=registration.client_id,
            node_id=node_id,
            num_parameters=registration.num_parameters,
            num_examples=registration.num_examples,
            num_global_parameters=registration.num_global_parameters,
            last_seen_round=server_round,
        )
        self._log_change(self._clients.get(client.client_id), client)
        self._clients[client.client_id] = client
        self._known_nodes.add(node_id)
        return client

    def _check(self, node_id: int, registration: Registration) -> None:
        who = f"client {registration.client_id} (node {node_id})"
        if registration.num_parameters > self._max_parameters:
            raise RegistrationError(
                f"{who} declares {registration.num_parameters:,} parameters; at most "
                f"{self._max_parameters:,} are accepted. Use a smaller model, or raise "
                "max-parameters on the server (heads take 129 floats for each parameter)."
            )
        self._check_global(who, registration)
        current = self._clients.get(registration.client_id)
        if current and current.node_id != node_id and current.node_id in self._online:
            raise RegistrationError(
                f"{who} claims a client-id that node {current.node_id} holds and is online with. "
                "Two participants cannot share one identity: give each its own client-id."
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
            logger.info("Client %s returned on node %s", now.client_id, now.node_id)

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
        self._clients = {row["client_id"]: Client(**row) for row in saved}

    def refusals(self) -> list[str]:
        """Return the reasons of the nodes that are online and were refused."""
        return [self._refused[node] for node in sorted(self._refused)]
