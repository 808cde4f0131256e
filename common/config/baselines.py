"""The baselines' own settings (docs/baselines.md says where each comes from)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.section import Section


class BaselineSection(Section):
    """What a baseline needs beside the local training that all methods share.

    `baseline_server_lr` is the rate of plain SGD on the server (FedGH, FedTGP, pFedHN).
    """

    fedprox_mu: float = Field(0.01, ge=0)
    prototype_weight: float = Field(10.0, ge=0)
    prototype_distance: Literal["mse", "euclid"] = "mse"
    fd_weight: float = Field(1.0, ge=0)
    fml_alpha: float = Field(0.5, ge=0, le=1)
    fml_beta: float = Field(0.5, ge=0, le=1)
    baseline_server_lr: float = Field(0.01, gt=0)
    fedgh_epochs: int = Field(1, ge=1)
    fedtgp_epochs: int = Field(100, ge=1)
    fedtgp_margin: float = Field(100.0, ge=0)
    pfedhn_batches: int = Field(50, ge=0)
