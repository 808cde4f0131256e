"""The baselines' server halves by method name; docs/baselines.md says how to add one."""

from __future__ import annotations

from typing import Any

from server_app.baselines.base import Baseline
from server_app.baselines.fd import FD
from server_app.baselines.fedavg import FedAvg, FedAvgFineTuned
from server_app.baselines.fedgh import FedGH
from server_app.baselines.fedproto import FedProto
from server_app.baselines.fedtgp import FedTGP
from server_app.baselines.fml import FML
from server_app.baselines.lgfedavg import LGFedAvg
from server_app.baselines.local import Local
from server_app.baselines.pfedhn import PFedHN

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
