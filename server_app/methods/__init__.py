"""The baselines' server halves by method name; docs/baselines.md says how to add one."""

from __future__ import annotations

from typing import Any

from server_app.methods.baseline_base import Baseline
from server_app.methods.fd import FD
from server_app.methods.fedavg import FedAvg, FedAvgFineTuned
from server_app.methods.fedgh import FedGH
from server_app.methods.fedproto import FedProto
from server_app.methods.fedtgp import FedTGP
from server_app.methods.fml import FML
from server_app.methods.lgfedavg import LGFedAvg
from server_app.methods.local import Local
from server_app.methods.pfedhn import PFedHN

BASELINES: dict[str, type[Baseline[Any]]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg-ft": FedAvgFineTuned,
    "fedprox": FedAvg,
    "lg-fedavg": LGFedAvg,
    "fedproto": FedProto,
    "fedgh": FedGH,
    "fd": FD,
    "fml": FML,
    "fedtgp": FedTGP,
    "pfedhn": PFedHN,
}
