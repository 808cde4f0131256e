"""Who is who: a stable client_id, the node it runs on at the moment, its key, its sizes.

An embedding belongs to a client, not to a connection. Where nodes have keys, a client_id belongs to
the key that first used it, across restarts of the node and of the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.errors import RegistrationError
from common.files import natural_key
from common.log import logger
from common.messages import Registration

GLOBAL_ID = "__global__"
"""Key of the global model's embedding v_g, and what those of common models begin with: a client
of a name that begins so would take another's common model."""

CHANGE_ROUNDS = 10
"""A client may change its model, and a node its client-id, once in so many: it costs memory."""

NEVER = -CHANGE_ROUNDS
NOWHERE = 0
"""Node id of a client that is not here; Flower gives it to no node."""


@dataclass(frozen=True)
class Client(Registration):
    """One participant as the server knows it: what it registered, and where it is.

    `key` is the fingerprint of the SuperNode key that the client_id is bound to, "" where it is
    bound to none; `changed_round` is when it last came with another model.
    """

    node_id: int = NOWHERE
    last_seen_round: int = 0
    key: str = ""
    changed_round: int = NEVER

    def has_model_of(self, other: Registration) -> bool:
        """Whether another registration is of a model of this size and group."""
        mine, theirs = ((x.num_parameters, x.group) for x in (self, other))
        return mine == theirs


Rule = Callable[[Registration, Client | None], None]
"""Raises RegistrationError when a registration does not fit the method, beside another client's:
in what all have to agree on, one that was admitted stands for everybody."""


@dataclass(frozen=True)
class NodeKey:
    """What a node proved to hold, which `binds` a client_id on first use; the operator's name."""

    fingerprint: str
    binds: bool
    name: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a node is not admitted.

    It is asked again once the node `holder` is offline, or from `until_round` or `until_s` on.
    """

    reason: str = ""
    holder: int | None = None
    until_round: float = math.inf
    until_s: float = math.inf


class Registry:
    """Maps client_id to node_id and back; refuses what would break identity.

    `max_parameters` caps K_i, before any head is built; `rule` is what the method demands besides.
    What a round costs here depends on who comes and goes, not on how many are known.

    Attributes
    ----------
    asked : the last round in which a client was asked to train, by client_id; none: never.
    named : by fingerprint, the names that the operator gave to keys: nobody else is called so.
    """

    def __init__(self, max_parameters: int, rule: Rule) -> None:
        self._max_parameters, self._rule = max_parameters, rule
        self._clients: dict[str, Client] = {}
        self._of_node: dict[int, str] = {}
        self._of_key: dict[str, str] = {}
        self._known_nodes: set[int] = set()
        self._here: list[Client] | None = None  # until somebody comes or goes
        self._round = 0
        self.asked: dict[str, int] = {}
        self._refused: dict[int, Refusal] = {}
        self._online: set[int] = set()
        self.named: dict[str, str] = {}
        self._asked_again: dict[str, int] = {}

    def present(self, server_round: int) -> list[Client]:
        """Return the clients that are online now, in natural order of client_id."""
        self._round = server_round
        if self._here is None:
            names = sorted((self._of_node[node] for node in self._known_nodes), key=natural_key)
            self._here = [self._clients[name] for name in names]
        return list(self._here)

    def _gone(self, nodes: AbstractSet[int]) -> None:
        """Note the clients of known nodes that have gone, or have to say anew who they are."""
        for client_id in [self._of_node[node_id] for node_id in nodes & self._known_nodes]:
            seen = replace(self._clients[client_id], last_seen_round=self._round)
            self._clients[client_id], self._here = seen, None
        self._known_nodes -= nodes

    def client(self, client_id: str) -> Client:
        """Return a client that has registered before."""
        return self._clients[client_id]

    def is_here(self, client: Client) -> bool:
        """Whether a client is online and has said who it is."""
        return client.node_id in self._known_nodes

    def clients(self) -> Mapping[str, Client]:
        """Return everyone who ever registered."""
        return self._clients

    def ask_again(self, client_ids: Iterable[str], server_round: int) -> None:
        """Have clients register anew at the next refresh: their replies do not fit.

        Everybody waits for the answer, so a client is asked once in `CHANGE_ROUNDS`.
        """
        for client_id in self._clients.keys() & set(client_ids):
            if server_round >= self._asked_again.get(client_id, NEVER) + CHANGE_ROUNDS:
                self._asked_again[client_id] = server_round
                self._gone({self._clients[client_id].node_id})

    def export(self) -> list[dict[str, Any]]:
        """Return everyone who ever registered, as JSON-able facts for a checkpoint."""
        return [
            asdict(client)
            | {"asked_round": self.asked.get(client_id, 0)}
            | ({"last_seen_round": self._round} if client.node_id in self._known_nodes else {})
            for client_id, client in self._clients.items()
        ]

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Load exported clients; each is present again once its node has registered."""
        for row in saved:
            known = {"asked_round": 0, **row, "node_id": NOWHERE}
            client_id, self.asked[client_id] = row["client_id"], known.pop("asked_round")
            self._clients[client_id] = client = Client(**known)
            if client.key:
                self._of_key[client.key] = client_id

    def unknown_nodes(self, online: Iterable[int], server_round: int, now: float) -> set[int]:
        """Note who is online in a round, at a clock's second; return who has to say who it is."""
        before, self._online = self._online, set(online)
        self._refused = {
            node: refusal
            for node, refusal in self._refused.items()
            if node in self._online
            and (refusal.holder is None or refusal.holder in self._online)
            and server_round < refusal.until_round
            and now < refusal.until_s
        }
        self._gone(self._known_nodes - (before & self._online))
        return self._online - self._known_nodes - self._refused.keys()

    def refuse(self, node_id: int, refusal: Refusal) -> None:
        """Leave a node alone for the time being."""
        self._refused[node_id] = refusal

    def refusal(self, node_id: int) -> Refusal | None:
        """Return why a node is not admitted, if it is not."""
        return self._refused.get(node_id)

    def refusals(self) -> list[str]:
        """Return the reasons of the nodes that are online and were refused."""
        return [x.reason for _, x in sorted(self._refused.items()) if x.reason]

    def admit(
        self,
        node_id: int,
        registration: Registration,
        server_round: int,
        *,
        key: NodeKey | None = None,
    ) -> Client | None:
        """Take what a node registered; a refused one is logged and returns None.

        `key` is None where keys do not count, which also undoes a binding. The client's K_i may
        differ from the one before: the method then gives it a fresh embedding.
        """
        client_id = registration.client_id
        current = before = self._clients.get(client_id)
        if before and key and key.name == client_id != self.named.get(before.key):
            before = None  # somebody else came first under the name of this one's key
        taken = before is not None and before.node_id != node_id and before.node_id in self._online
        holder = before.node_id if before is not None and taken else None
        changed = before is not None and not before.has_model_of(registration)
        may_change = before.changed_round + CHANGE_ROUNDS if before and changed else 0
        try:
            self._check(node_id, registration, key, holder)
            self._check_name(node_id, client_id, server_round)
            if server_round < may_change:
                why = f"comes with another model again; it may from round {may_change} on. Keep one"
                raise RegistrationError(f"client {client_id} (node {node_id}) {why} for a run.")
        except RegistrationError as error:
            until = max(may_change, server_round + CHANGE_ROUNDS)  # it may have been mended
            self._refused[node_id] = Refusal(str(error), holder, until_round=until)
            logger.error("Refused: %s", error)
            return None
        bound = key is not None and (key.binds or (before is not None and before.key != ""))
        client = Client(
            **vars(registration),
            node_id=node_id,
            last_seen_round=server_round,
            key=key.fingerprint if key is not None and bound else "",
            changed_round=server_round if changed else getattr(before, "changed_round", NEVER),
        )
        self._take_place(client, current)
        return client

    def _take_place(self, client: Client, before: Client | None) -> None:
        """Enter a client in the place of what it was; its node speaks for nobody else."""
        client_id, node_id = client.client_id, client.node_id
        if (other := self._of_node.get(node_id, client_id)) != client_id:
            self._clients[other] = replace(self._clients[other], node_id=NOWHERE)
        if before is not None:
            self._of_node.pop(before.node_id, None)
            self._known_nodes.discard(before.node_id)
            self._of_key.pop(before.key, None)
        self._clients[client_id], self._of_node[node_id] = client, client_id
        if client.key:
            self._of_key[client.key] = client_id
        self._known_nodes.add(node_id)
        self._here = None

    def _check(
        self, node_id: int, registration: Registration, key: NodeKey | None, holder: int | None
    ) -> None:
        client_id, cap = registration.client_id, self._max_parameters
        who = f"client {client_id} (node {node_id})"
        if client_id.startswith(GLOBAL_ID) or not client_id.isprintable():
            raise RegistrationError(
                f"node {node_id} calls itself {client_id!r}: a client-id has printable characters "
                f"only and does not begin with {GLOBAL_ID!r}, which names the models that clients "
                "have in common. Choose another."
            )
        if registration.num_parameters > cap:
            raise RegistrationError(
                f"{who} declares {registration.num_parameters:,} parameters; at most {cap:,} are "
                "accepted. Use a smaller model, or raise max-parameters on the server (heads take "
                "129 floats for each parameter)."
            )
        self._rule(
            registration, next((c for n, c in self._clients.items() if n != client_id), None)
        )
        if key is not None:
            self._check_key(who, client_id, key)
        if holder is not None:
            raise RegistrationError(
                f"{who} claims a client-id that node {holder} holds and is online with. "
                "Two participants cannot share one identity: give each its own client-id."
            )

    def _check_name(self, node_id: int, client_id: str, server_round: int) -> None:
        """Refuse a node that spoke for somebody else a moment ago, unless that one is known."""
        if node_id not in self._of_node or client_id in self._clients:
            return
        other = self._clients[self._of_node[node_id]]
        if server_round < other.last_seen_round + CHANGE_ROUNDS:
            raise RegistrationError(
                f"node {node_id} comes as client {client_id}; in round {other.last_seen_round} "
                f"it was client {other.client_id}. A participant keeps its client-id."
            )

    def _check_key(self, who: str, client_id: str, key: NodeKey) -> None:
        current, presented = self._clients.get(client_id), key.fingerprint
        if key.name != client_id and client_id in self.named.values():
            raise RegistrationError(
                f"{who} has a client-id that is the name of another participant's key. Set it to "
                "the name that the operator registered this one's key with."
            )
        if current and current.key not in ("", presented) and key.name != client_id:
            raise RegistrationError(
                f"{who} presents key {presented or 'none'}, but this client-id belongs to "
                f"the key that first used it, {current.key}. An impostor, or a participant with a "
                'new key: then resume once with client-keys = "ignore", to bind all anew later.'
            )
        other = self._of_key.get(presented, client_id)
        if other != client_id:
            raise RegistrationError(
                f"{who} presents key {presented}, which belongs to client {other}. One key is one "
                "participant: keep the client-id, or register a key of its own."
            )
