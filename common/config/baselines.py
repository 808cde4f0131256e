"""The baselines' own settings (docs/baselines.md says where each comes from)."""

from __future__ import annotations

from pydantic import Field

from common.config.section import Section


class BaselineSection(Section):
    """What a baseline needs beside the local training that all methods share.

    `baseline_server_lr` is the rate of plain SGD on the server (FedGH, FedTGP, pFedHN).
    """

    fedprox_mu: float = Field(0.01, ge=0)
    prototype_weight: float = Field(10.0, ge=0)
    baseline_server_lr: float = Field(0.01, gt=0)
    pfedhn_batches: int = Field(50, ge=0)
