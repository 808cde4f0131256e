"""Who takes part: asks nodes that are new or back who they are, and admits them.

It happens at the top of every round, so clients join, leave and return at any time.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from common.config import RunConfig
from common.errors import RunError, listing
from common.files import natural_key, printable
from common.log import logger
from common.messages import FINAL, REASON, REFUSED, REGISTER, Recipient, Registration
from common.records import Content
from server_app.clients import Client, NodeKey, Refusal, Registry
from server_app.transport import NO_ANSWER, Arrival, Outgoing, Transport

REGISTRATION_S, LATE_REGISTRATION_S = 300.0, 60.0
"""A node that has not said who it is by then must not hold up the others; the second where enough
are there to train."""

NOTICE_S, MOST_WORDS = 10.0, 1000
"""A node that is refused has so long to take notice of so many characters."""

PROMPT_S = 10.0
"""A node that takes longer to say who it is has kept those waiting who could train."""

RETRY_S = 15.0
"""Seconds until a node that failed to register is asked again."""

SETTLE_S = 2.0
"""A run starts when no node has come for so long."""

FIRST_CLIENTS = 3
"""Of fewer nobody can say whose change is odd, and all that come later begin from it."""

LONGEST_RETRY_ROUNDS = 16
"""Who does not answer is asked again after 1, 2, 4, ... rounds, at most these."""


class Admission:
    """Keeps the registry in step with who is online.

    `add_client` is called with every client that is admitted: new, back, or with another model.
    """

    def __init__(
        self,
        config: RunConfig,
        transport: Transport,
        registry: Registry,
        add_client: Callable[[Client], None],
    ) -> None:
        self._config, self._transport = config, transport
        self._registry, self._add_client = registry, add_client
        self._silences: Counter[int] = Counter()
        self._ask_from: dict[int, int] = {}  # rounds, of nodes that took their time
        self._rests_until: dict[str, int] = {}  # rounds, of clients that everybody waited for
        self._said: dict[int, Registration] = {}  # by node, before anybody is admitted
        self._settled = False
        self._last_reply: dict[str, int] = {}

    def refresh(self, server_round: int) -> list[Client]:
        """Register nodes that are new or back; wait until `min-clients` are present.

        Raises RunError where too few came in time, and names why others could not join.
        """
        section, clock = self._config.schedule, self._transport.clock
        least = self._least(server_round)
        self._let_rest(server_round)
        if not self._settled:
            self._settle(min(SETTLE_S, section.wait_for_clients_s))
        deadline, said = clock.monotonic() + section.wait_for_clients_s, False
        while True:
            late = clock.monotonic() >= deadline
            self._register(server_round, least=0 if late else least)
            present = self._registry.present(server_round)
            if len(present) >= least:
                awake = [
                    c for c in present if self._rests_until.get(c.client_id, 0) <= server_round
                ]
                return awake if len(awake) >= least else present
            if late:
                raise RunError(self._too_few(present, server_round))
            if not said:
                logger.info("Waiting for %d clients; %d are here", least, len(present))
            said = True
            clock.sleep(0.5)

    def _least(self, server_round: int) -> int:
        first = FIRST_CLIENTS if server_round == 1 else 1
        return self._config.schedule.min_clients or first

    def _let_rest(self, server_round: int) -> None:
        """Leave alone for a while who did not answer at all, where there are enough others."""
        known = self._registry.clients()
        for client_id in sorted(self._transport.silent & known.keys(), key=natural_key):
            until = server_round + self._pause(known[client_id].node_id)
            self._rests_until[client_id] = until
            text = (
                "Client %s did not answer: it trains again from round %d on, if others are enough"
            )
            logger.warning(text, client_id, until)
        self._transport.silent.clear()

    def attendance(self, server_round: int, replied: Collection[str]) -> dict[str, Any]:
        """Return who is there, the round of everybody's last reply, and whom it refuses and why."""
        registry = self._registry
        self._last_reply |= dict.fromkeys(replied, server_round)
        return {
            "round": server_round,
            "participants": [
                {
                    "client_id": client_id,
                    "online": registry.is_here(client),
                    "last_reply": self._last_reply.get(client_id),
                }
                for client_id, client in registry.clients().items()
            ],
            "refused": registry.refusals(),
        }

    def _settle(self, seconds: float) -> None:
        """Wait at the start until no node has come for `seconds`: simulated ones trickle in."""
        clock, known = self._transport.clock, set[int]()
        since = clock.monotonic()
        latest = since + self._config.schedule.wait_for_clients_s
        while clock.monotonic() < min(since + seconds, latest):
            online = set(self._transport.grid.get_node_ids())
            if online - known:
                known, since = known | online, clock.monotonic()
            clock.sleep(min(0.2, seconds))
        self._settled = True

    def _register(self, server_round: int, *, least: int) -> None:
        """Ask who is new; admit them, the first ones when `least` have said who they are.

        What all have to agree on is then what most of them declare, and not the first.
        """
        transport = self._transport
        keys = transport.attempt(self._keys)
        unknown = self._registry.unknown_nodes(keys, server_round, transport.clock.monotonic())
        self._said = {node: said for node, said in self._said.items() if node in keys}
        later = {node for node, now in self._ask_from.items() if server_round < now}
        nodes = sorted(unknown - transport.busy_nodes() - self._said.keys() - later)
        section = self._config.schedule
        enough = len(self._registry.present(server_round)) >= self._least(server_round)
        patience = REGISTRATION_S
        if enough:
            patience = min(LATE_REGISTRATION_S, section.round_deadline_s or LATE_REGISTRATION_S)
        messages = (self._question(node, server_round, patience) for node in nodes)
        started, took = transport.clock.monotonic(), dict[int, float]()
        arrivals = []
        for arrival in transport.exchange(messages):
            arrivals.append(arrival)
            took[arrival.pending.node_id] = transport.clock.monotonic() - started
        for arrival in sorted(arrivals, key=lambda a: a.pending.node_id):
            node_id = arrival.pending.node_id
            registration = transport.read(arrival, Registration.read)
            if registration is None:
                self._note_failure(arrival, server_round, enough=enough)
                continue
            self._said[node_id] = registration
            if enough and took[node_id] > PROMPT_S:  # when it comes again, it is not waited for
                self._ask_from[node_id] = server_round + self._pause(node_id)
        if not self._registry.clients() and len(self._said) < least:
            return
        said, self._said = majority_first(self._said), {}
        for node_id, registration in said:
            before = self._registry.clients().get(registration.client_id)
            key = keys[node_id]
            client = self._registry.admit(node_id, registration, server_round, key=key)
            if client is not None:
                _log_change(before, client)
                self._add_client(client)
        silent = self._tell_refused([node_id for node_id, _ in said], server_round)
        for node_id in silent if enough else ():  # when it comes again, it is not waited for
            self._ask_from[node_id] = server_round + self._pause(node_id)

    def _tell_refused(self, nodes: Iterable[int], server_round: int) -> list[int]:
        """Tell those of these nodes that are not admitted why; return those that take no notice.

        Waiting is of no use to them, but where somebody else has to leave first.
        """
        pairs = [(node, self._registry.refusal(node)) for node in nodes]
        notices = (
            self._transport.message(
                REFUSED,
                Recipient(f"of node {node}", node),
                Content({REASON: told(refusal.reason), FINAL: refusal.holder is None}),
                server_round=server_round,
                patience_s=NOTICE_S,
            )
            for node, refusal in pairs
            if refusal is not None
        )
        heard = self._transport.exchange(notices)
        return [a.pending.node_id for a in heard if a.failure.startswith(NO_ANSWER)]

    def _keys(self) -> dict[int, NodeKey | None]:
        """Return who is online, with the key that each node proved to hold."""
        mode, grid = self._config.run.client_keys, self._transport.grid
        if mode == "ignore":
            return dict.fromkeys(grid.get_node_ids())
        keys = {
            node.node_id: NodeKey(
                fingerprint(node.public_key), mode == "bind" or bool(node.name), node.name
            )
            for node in grid.get_nodes()
        }
        self._registry.named |= {key.fingerprint: key.name for key in keys.values() if key.name}
        return dict(keys)

    def _question(self, node_id: int, server_round: int, patience_s: float) -> Outgoing:
        return self._transport.message(
            REGISTER,
            Recipient(f"of node {node_id}", node_id),
            Content(),
            server_round=server_round,
            patience_s=patience_s,
        )

    def _note_failure(self, arrival: Arrival, server_round: int, *, enough: bool) -> None:
        """Leave a node alone for a while; for longer each time where others wait for it."""
        node_id = arrival.pending.node_id
        refusal = Refusal(until_s=self._transport.clock.monotonic() + RETRY_S)
        if enough or arrival.failure.startswith(NO_ANSWER):
            again = self._ask_from[node_id] = server_round + self._pause(node_id)
            refusal = Refusal(printable(arrival.failure)[:MOST_WORDS], until_round=again)
        self._registry.refuse(node_id, refusal)

    def _pause(self, node_id: int) -> int:
        """Return for how many rounds a node is left alone that has kept others waiting."""
        self._silences[node_id] += 1
        return int(min(2 ** (self._silences[node_id] - 1), LONGEST_RETRY_ROUNDS))

    def _too_few(self, present: list[Client], server_round: int) -> str:
        section = self._config.schedule
        why = listing([*self._registry.refusals(), *self._transport.recent], 3)
        refused = f" Clients that could not join: {why}" if why else ""
        known = self._registry.clients()
        gone = known.keys() - {client.client_id for client in present}
        least = self._least(server_round)
        within = f"within {section.wait_for_clients_s:g} s; min-clients is {least}."
        if server_round == 1 or not gone:
            return (
                f"{len(present)} clients registered {within} Start more clients, or lower "
                f"min-clients.{refused}"
            )
        away = [
            f"{client_id} (last here in round {known[client_id].last_seen_round})"
            for client_id in sorted(gone, key=natural_key)
        ]
        return (
            f"round {server_round}: {len(present)} clients are here, and no others came {within} "
            f"Away: {listing(away)}. Everything learned so far is in the checkpoint: start them "
            f"again, or lower min-clients, then resume with resume-from.{refused}"
        )


def told(reason: str) -> str:
    """Return what a refused node is told: not whose key and node a name belongs to.

    >>> told("client a (node 3) claims a client-id that node 7 holds; it is of SHA256:ab12")
    'client a (node ...) claims a client-id that node ... holds; it is of SHA256:...'
    """
    return re.sub(r"(?<=\bnode )\d+|(?<=SHA256:)\w+", "...", reason)[:MOST_WORDS]


def majority_first(said: Mapping[int, Registration]) -> list[tuple[int, Registration]]:
    """Return registrations by node, first those that declare what most of them do.

    What all have to agree on is then theirs.

    Of equally many the smaller sizes come first, then the smaller node id.
    """
    sizes = {n: (r.num_global_parameters, r.num_classes, r.feature_dim) for n, r in said.items()}
    votes = Counter(sizes.values())
    return sorted(said.items(), key=lambda item: (-votes[sizes[item[0]]], sizes[item[0]], item[0]))


def fingerprint(public_key: bytes) -> str:
    """Return a short name of a public key: SHA-256, in hex, of which 16 bytes are shown."""
    return "SHA256:" + hashlib.sha256(public_key).hexdigest()[:32] if public_key else ""


def _log_change(before: Client | None, now: Client) -> None:
    name, size = now.client_id, f"{now.num_parameters:,}"
    if before is None:
        logger.info("Client %s joined (%s parameters)", name, size)
    elif before.num_parameters != now.num_parameters:
        text = "Client %s changed from %s to %s parameters: it starts with a new embedding"
        logger.warning(text, name, f"{before.num_parameters:,}", size)
    elif before.node_id != now.node_id:
        logger.info("Client %s is back, on node %s", name, now.node_id)
