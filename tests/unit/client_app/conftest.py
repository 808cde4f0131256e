"""Fixtures of the client's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client_app.data.examples import LOADED
from common.config import ClientSection
from tests.unit.client_app.pictures import random_pixels, write_parquet


@pytest.fixture
def section(tmp_path: Path) -> ClientSection:
    """300 random pictures of 10 classes, as cifar10, for 6 clients; nothing in memory."""
    LOADED.clear()
    labels = np.arange(300) % 10
    write_parquet(tmp_path / "data/cifar10/train.parquet", random_pixels(300, 32, 32, 3), labels)
    return ClientSection(
        dataset="cifar10",
        data_dir=str(tmp_path / "data"),
        cache_dir=str(tmp_path / "cache"),
        num_partitions=6,
        validation_fraction=0.0,
    )
