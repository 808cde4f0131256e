"""A node that claims another participant's name, to be sent that one's parameters."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from common.messages import Registration
from experiments.attacks.federation import Federation
from server_app.clients import NodeKey, Registry

VICTIM_NODE, IMPOSTOR_NODE = 11, 12


def attack(federation: Federation, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what the run's registry says to an impostor of its first client, in four situations.

    What the impostor registers is what its own data and model make it say, under the wrong name.
    """
    victim, *others = federation.clients()
    declared = federation.method((others or [victim])[0]).declare()
    claim = Registration(**{**vars(declared), "client_id": victim})
    own = federation.method(victim).declare()
    situations = {
        "the victim is online, no keys": (True, None, None),
        "the victim is online, keys are bound": (True, "victim's", "impostor's"),
        "the victim is away, keys are bound": (False, "victim's", "impostor's"),
        "the victim is away, no keys": (False, None, None),
    }
    rows = []
    for name, (online, victims_key, impostors_key) in situations.items():
        registry = copy.deepcopy(federation.registry)
        registry.unknown_nodes({VICTIM_NODE}, 1, 0.0)
        registry.admit(VICTIM_NODE, own, 1, key=_key(victims_key))
        nodes = {VICTIM_NODE, IMPOSTOR_NODE} if online else {IMPOSTOR_NODE}
        registry.unknown_nodes(nodes, 2, 1.0)
        admitted = registry.admit(IMPOSTOR_NODE, claim, 2, key=_key(impostors_key))
        answer = "is admitted, and gets the victim's parameters" if admitted else "is refused"
        rows.append({"situation": name, "the_impostor": answer, "because": _reason(registry)})
    return rows


def _key(fingerprint: str | None) -> NodeKey | None:
    return NodeKey(fingerprint, binds=True) if fingerprint else None


def _reason(registry: Registry) -> str:
    return " ".join(registry.refusals()).partition(". ")[0]
