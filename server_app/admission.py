"""Who takes part: asks new nodes who they are, admits them, tells the method who is new."""

from __future__ import annotations

import time

from flwr.app import RecordDict
from flwr.serverapp import Grid

from common import wire
from common.errors import RunError, listing
from common.wire import Registration
from server_app.clients import Client, NodeKey, Registry, fingerprint, natural_key
from server_app.methods.base import Method
from server_app.transport import Answer, Letter, Ticket

REGISTRATION_S = 300.0
"""A node that has not said who it is by then must not hold up the others."""
SETTLE_S = 2.0
"""A run starts when no node has come for so long."""


class Admission:
    """Keeps registry and method in step with who is online.

    Parameters
    ----------
    method, registry : changed in place.
    """

    def __init__(self, method: Method, registry: Registry) -> None:
        self._method = method
        self._post = method.post
        self._registry = registry
        self._settled = False

    def refresh(self, grid: Grid, server_round: int) -> list[Client]:
        """Register nodes that are new or back; wait until `min-clients` are present.

        Raises
        ------
        RunError
            Too few came in time; the reasons of those that could not join are named.
        """
        section = self._post.config.schedule
        if not self._settled:
            self._settle(grid, min(SETTLE_S, section.wait_for_clients_s))
        deadline = time.monotonic() + section.wait_for_clients_s
        while True:
            self._register(grid, server_round)
            present = self._registry.present(server_round)
            if len(present) >= section.min_clients:
                return present
            if time.monotonic() >= deadline:
                raise RunError(self._too_few(present, server_round))
            time.sleep(0.5)

    def _settle(self, grid: Grid, seconds: float) -> None:
        """Wait at the start until no node has come for `seconds`: simulated ones trickle in."""
        known: set[int] = set()
        since = time.monotonic()
        while time.monotonic() - since < seconds:
            online = set(grid.get_node_ids())
            if online - known:
                known, since = online, time.monotonic()
            time.sleep(min(0.2, seconds))
        self._settled = True

    def _register(self, grid: Grid, server_round: int) -> None:
        keys = self._keys(grid)
        busy = self._post.mailbox.busy_nodes()
        nodes = [n for n in self._registry.unknown_nodes(keys, server_round) if n not in busy]
        content = wire.encode_query(self._post.header(server_round))
        letters = (Letter(self._ticket(node, server_round), content) for node in nodes)
        answers = sorted(self._post.mailbox.exchange(letters), key=lambda a: a.ticket.node_id)
        for answer in answers:
            self._admit(answer, server_round, keys[answer.ticket.node_id])

    def _keys(self, grid: Grid) -> dict[int, NodeKey | None]:
        """Return who is online, with the key that each node proved to hold."""
        mode = self._post.config.run.client_keys
        if mode == "ignore":
            return dict.fromkeys(grid.get_node_ids())
        return {
            node.node_id: NodeKey(fingerprint(node.public_key), mode == "bind" or bool(node.name))
            for node in grid.get_nodes()
        }

    def _ticket(self, node_id: int, server_round: int) -> Ticket:
        return Ticket(
            client_id=f"of node {node_id}",
            node_id=node_id,
            message_type=wire.REGISTER,
            server_round=server_round,
            sent_at=time.monotonic(),
            patience_s=REGISTRATION_S,
        )

    def _admit(self, answer: Answer, server_round: int, key: NodeKey | None) -> None:
        node_id = answer.ticket.node_id
        registration = self._post.desk.read(answer, self._decode)
        if registration is None:
            if answer.content is None and answer.failure.startswith("no answer"):
                self._registry.note_silence(node_id, answer.failure, server_round)
            else:
                self._registry.note_failure(node_id)
            return
        client = self._registry.admit(node_id, registration, server_round, key=key)
        if client is not None:
            self._method.welcome(client)

    def _decode(self, content: RecordDict, source: str) -> Registration:
        registration = wire.decode_registration(content, source)
        self._method.require(registration, source)
        return registration

    def _too_few(self, present: list[Client], server_round: int) -> str:
        section = self._post.config.schedule
        why = listing(self._registry.refusals() + self._post.desk.recent, 3)
        refused = f" Clients that could not join: {why}" if why else ""
        away = self._away(present)
        if server_round == 1 or not away:
            return (
                f"{len(present)} clients registered within {section.wait_for_clients_s:g} s; "
                f"min-clients is {section.min_clients}. Start more clients, or lower min-clients."
                + refused
            )
        return (
            f"round {server_round}: {len(present)} clients are here, and no others came within "
            f"{section.wait_for_clients_s:g} s; min-clients is {section.min_clients}. "
            f"Away: {listing(away)}. Everything learned so far is in the checkpoint: start them "
            "again, or lower min-clients, then resume with resume-from." + refused
        )

    def _away(self, present: list[Client]) -> list[str]:
        here = {client.client_id for client in present}
        known = sorted(self._registry.clients().items(), key=lambda item: natural_key(item[0]))
        return [
            f"{client_id} (last here in round {client.last_seen_round})"
            for client_id, client in known
            if client_id not in here
        ]
