"""Local: nothing travels. The bar that decides whether federation helped at all."""

from __future__ import annotations

from collections.abc import Sequence

from common.parcels import Arrays, Parcel
from server_app.clients import Client
from server_app.methods.baseline_base import Baseline, Upload


class Local(Baseline[None]):
    """Ask for training, and for nothing back but counts."""

    def download(self, client: Client) -> Arrays:
        """Return nothing."""
        return {}

    def read(self, client: Client, parcel: Parcel) -> None:
        """Read nothing."""

    def fold(self, uploads: Sequence[Upload[None]], server_round: int) -> None:
        """Learn nothing."""
