"""The one table of methods: what each is called, where its two halves are and what it needs.

A line here and one file a side add a method (docs/baselines.md): `<side>/methods/<module>.py` has a
class of the name given, for server_app and for client_app.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from common.errors import unknown_name

SENT = "the model that the server sends, before local training"
TUNED = "the model that the server sends, after one more local epoch"
OWN = "the client's own model, after local training"
HEAD = "own features after local training, under the head that the server sends"
MIXED = "the own and the common model that the server sends, weighed by the validation part"
ENSEMBLE = "own and global-model, both trained alone, weighed by the validation part"
PROTOTYPES = "own features after local training, by the nearest prototype that the server sends"

HEAD_SIZES = ("num_classes", "feature_dim")
GLOBAL_SIZE = ("num_global_parameters",)


@dataclass(frozen=True)
class MethodInfo:
    """One method, as tables and pictures call it, and where its halves are."""

    label: str
    module: str
    class_name: str
    tested: str  # what its accuracy is of
    look: tuple[int, int]  # indices of its colour and dash (`experiments.report.looks`)
    needs: tuple[str, ...] = ()  # further fields of `Registration` that clients must fill in
    others: tuple[str, ...] = ()  # further predictors whose accuracy clients report
    synchronous: bool = True  # one server step a round, of all replies; else the schedule decides
    of_classes: bool = False  # whether it needs labels that are classes

    @property
    def is_baseline(self) -> bool:
        """Whether the method is not this project's own."""
        return not self.module.startswith("mhpfedhn")


_FEDPROTO = (HEAD_SIZES, ("head",), True, True)

METHODS = {
    "mh-pfedhn": MethodInfo("MH-pFedHN", "mhpfedhn", "MHpFedHN", SENT, (0, 0), synchronous=False),
    "mh-pfedhn-gd": MethodInfo(
        "MH-pFedHNGD", "mhpfedhn", "MHpFedHN", SENT, (1, 0), GLOBAL_SIZE,
        synchronous=False,
    ),
    "mh-pfedhn-pg": MethodInfo(
        "MH-pFedHN-PG", "mhpfedhn", "MHpFedHNPG", MIXED, (1, 1), GLOBAL_SIZE,
        ("own", "common"), synchronous=False,
    ),
    "local": MethodInfo("Local", "base", "Local", OWN, (7, 1)),
    "fedavg": MethodInfo("FedAvg", "fedavg", "FedAvg", SENT, (2, 0), ("group",)),
    "fedavg-ft": MethodInfo(
        "FedAvg + fine-tuning", "fedavg", "FedAvgFineTuned", TUNED, (2, 1), ("group",), ("global",)
    ),
    "fedprox": MethodInfo("FedProx", "fedavg", "FedProx", SENT, (2, 2), ("group",)),
    "fml": MethodInfo("FML", "fedavg", "FML", OWN, (5, 0), GLOBAL_SIZE, of_classes=True),
    "fedkd": MethodInfo("FedKD", "fedavg", "FedKD", OWN, (5, 2), GLOBAL_SIZE, of_classes=True),
    "local-ensemble": MethodInfo(
        "Local ensemble", "fedavg", "LocalEnsemble", ENSEMBLE, (7, 2), (), ("own", "common")
    ),
    "lg-fedavg": MethodInfo("LG-FedAvg", "heads", "LGFedAvg", HEAD, (3, 0), HEAD_SIZES),
    "fedgh": MethodInfo("FedGH", "heads", "FedGH", HEAD, (3, 1), HEAD_SIZES, of_classes=True),
    "fedproto": MethodInfo("FedProto", "prototypes", "FedProto", PROTOTYPES, (4, 0), *_FEDPROTO),
    "fedtgp": MethodInfo("FedTGP", "prototypes", "FedTGP", PROTOTYPES, (4, 1), *_FEDPROTO),
    "fd": MethodInfo("FD", "prototypes", "FD", OWN, (5, 1), ("num_classes",), of_classes=True),
    "pfedhn": MethodInfo(
        "pFedHN", "pfedhn", "PFedHN", SENT, (6, 0), ("group",), synchronous=False
    ),
}  # fmt: skip


@cache
def method_class(name: str, side: str) -> type[Any]:
    """Import one half of a method, of "server_app" or "client_app"."""
    info = METHODS[name]
    found: type[Any] = getattr(import_module(f"{side}.methods.{info.module}"), info.class_name)
    return found


def known_method(name: str) -> str:
    """Return a method's name; raise ValueError that names the nearest where there is none."""
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS).removesuffix("."))
    return name
