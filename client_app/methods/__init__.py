"""The baselines' client halves by method name; docs/baselines.md says how to add one."""

from __future__ import annotations

from client_app.methods.base import Trainer
from client_app.methods.distilled import FD, FML
from client_app.methods.fedavg import FedAvg, FedAvgFineTuned, FedProx
from client_app.methods.heads import FedGH, LGFedAvg
from client_app.methods.local import Local
from client_app.methods.pfedhn import PFedHN
from client_app.methods.prototypes import FedProto

TRAINERS: dict[str, type[Trainer]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg-ft": FedAvgFineTuned,
    "fedprox": FedProx,
    "lg-fedavg": LGFedAvg,
    "fedproto": FedProto,
    "fedgh": FedGH,
    "fd": FD,
    "fml": FML,
    "fedtgp": FedProto,
    "pfedhn": PFedHN,
}
