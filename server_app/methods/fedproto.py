"""FedProto (Tan et al. 2022, arXiv 2105.00243): only class means of features travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common.class_means import MEANS, ClassMeans, pool
from common.config import RunConfig
from common.parcels import COUNTS, Arrays, Parcel
from server_app.clients import Client
from server_app.methods.baseline_base import Baseline, CheckNorm, Upload
from server_app.output.checkpoint import required_tensor


class FedProto(Baseline[ClassMeans]):
    """Averages clients' class means, weighted by their counts.

    Attributes
    ----------
    prototypes : of every class that anybody ever sent; None before.
    """

    needs = frozenset({"num_classes", "feature_dim"})
    others: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, config: RunConfig, check_norm: CheckNorm) -> None:
        super().__init__(config, check_norm)
        self.prototypes: ClassMeans | None = None

    def dim(self, client: Client) -> int:
        """Return the size of one class's vector."""
        return client.feature_dim

    def download(self, client: Client) -> Arrays:
        """Return the prototypes, once there are any; not who has how many examples."""
        return {} if self.prototypes is None else self.prototypes.presence().arrays()

    def read(self, client: Client, parcel: Parcel) -> ClassMeans:
        """Read the client's class means; their norm is limited as a delta's is."""
        upload = ClassMeans.read(parcel, client.num_classes, self.dim(client))
        self.check_norm(upload.means, MEANS, parcel.source)
        return upload

    def fold(self, uploads: Sequence[Upload[ClassMeans]], server_round: int) -> None:
        """Renew the prototypes of the classes that came; the others stay as they were."""
        self.prototypes = renewed(self.prototypes, pool([u.content for u in uploads]))

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the prototypes."""
        if self.prototypes is None:
            return {}, {"prototypes": None}
        tensors = {
            f"prototypes.{COUNTS}": torch.from_numpy(self.prototypes.counts),
            f"prototypes.{MEANS}": torch.from_numpy(self.prototypes.means),
        }
        return tensors, {"prototypes": list(self.prototypes.means.shape)}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the prototypes."""
        if meta["prototypes"] is None:
            return
        rows, dim = meta["prototypes"]
        self.prototypes = ClassMeans(
            required_tensor(tensors, f"prototypes.{COUNTS}", (rows,)).numpy().copy(),
            required_tensor(tensors, f"prototypes.{MEANS}", (rows, dim)).numpy().copy(),
        )


def renewed(before: ClassMeans | None, now: ClassMeans) -> ClassMeans:
    """Take the new means where a class came, and the earlier ones where it did not."""
    if before is None:
        return now
    fresh = now.counts > 0
    return ClassMeans(
        np.where(fresh, now.counts, before.counts),
        np.where(fresh[:, None], now.means, before.means),
    )
