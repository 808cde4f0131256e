"""What is done with the data once, before anybody trains."""

from __future__ import annotations

from pathlib import Path

from client_app.data.examples import open_examples
from client_app.data.partitions import client_indices
from common.config import ClientSection


def prepare_data(section: ClientSection, *, seed: int, partition_id: int = 0) -> Path:
    """Decode the data set and draw the partition, unless that was done before a run.

    What a participant's own function returns is asked anew. Returns the folder of the cache entry.
    Safe to call from many processes at once.

    Raises
    ------
    ConfigError, DataError
        The section does not describe data that can be loaded and divided.
    """
    dataset = open_examples(section, anew=":" in section.dataset)
    client_indices(dataset, section, partition_id=max(0, partition_id), seed=seed)
    return dataset.folder
