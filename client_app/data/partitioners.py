"""The splits of `splits` as flwr-datasets partitioners, and that library's own by name.

Importing this costs seconds (flwr_datasets, datasets); `partitions` does it only when a partition
of the library is drawn for the first time.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets import partitioner as library
from flwr_datasets.partitioner import Partitioner

from client_app.data.splits import Indices, split_dirichlet, split_pathological
from common.errors import ConfigError, DataError, listing
from common.seeding import numpy_generator

# names that this module gives to the library's partitioners
LIBRARY: dict[str, type[Partitioner]] = {
    "iid": library.IidPartitioner,
    "linear": library.LinearPartitioner,
    "square": library.SquarePartitioner,
    "exponential": library.ExponentialPartitioner,
    "size": library.SizePartitioner,
    "shard": library.ShardPartitioner,
    "inner-dirichlet": library.InnerDirichletPartitioner,
    "natural-id": library.NaturalIdPartitioner,
    "library-dirichlet": library.DirichletPartitioner,
    "library-pathological": library.PathologicalPartitioner,
}


class _IndexPartitioner(Partitioner):  # type: ignore[misc]
    """Base: draw index arrays at first use, then select rows."""

    def __init__(self, *, num_partitions: int, partition_by: str, seed: int) -> None:
        super().__init__()
        self._num_partitions = num_partitions
        self._partition_by = partition_by
        self._seed = seed
        self._parts: list[Indices] | None = None

    def load_partition(self, partition_id: int) -> Dataset:
        """Return the rows of one client, in the order of the data set."""
        return self.dataset.select(self.indices()[partition_id])

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self._num_partitions

    def indices(self) -> list[Indices]:
        """Return the row numbers of every client, ascending."""
        if self._parts is None:
            labels = np.asarray(self.dataset[self._partition_by], dtype=np.int64)
            self._parts = self._draw(labels, numpy_generator(self._seed, "partition"))
        return self._parts

    def _draw(self, labels: Indices, rng: np.random.Generator) -> list[Indices]:
        raise NotImplementedError


class PublishedPathologicalPartitioner(_IndexPartitioner):
    """The pathological split as the paper's authors draw it; see `splits.split_pathological`.

    The library's PathologicalPartitioner divides a class evenly among its holders instead.
    """

    def __init__(
        self, *, num_partitions: int, partition_by: str, classes_per_client: int, seed: int = 42
    ) -> None:
        super().__init__(num_partitions=num_partitions, partition_by=partition_by, seed=seed)
        self._classes_per_client = classes_per_client

    def _draw(self, labels: Indices, rng: np.random.Generator) -> list[Indices]:
        return split_pathological(
            labels,
            num_clients=self._num_partitions,
            classes_per_client=self._classes_per_client,
            rng=rng,
        )


class PublishedDirichletPartitioner(_IndexPartitioner):
    """Dirichlet shares for each class, redrawn a bounded number of times.

    See `splits.split_dirichlet`. The library's DirichletPartitioner stops after 10 draws.
    """

    def __init__(
        self,
        *,
        num_partitions: int,
        partition_by: str,
        alpha: float,
        min_client_examples: int = 30,
        seed: int = 42,
    ) -> None:
        super().__init__(num_partitions=num_partitions, partition_by=partition_by, seed=seed)
        self._alpha = alpha
        self._min_examples = min_client_examples

    def _draw(self, labels: Indices, rng: np.random.Generator) -> list[Indices]:
        return split_dirichlet(
            labels,
            num_clients=self._num_partitions,
            alpha=self._alpha,
            min_examples=self._min_examples,
            rng=rng,
        )


def split_by_library(
    name: str, labels: Indices, *, num_clients: int, seed: int, options: dict[str, Any]
) -> list[Indices]:
    """Draw a partition with one of the library's partitioners.

    The number of clients, the seed and the label column are filled in where the partitioner takes
    them and `options` does not have them.

    Raises
    ------
    ConfigError
        The options are not those of the partitioner, or give another number of clients.
    DataError
        The partitioner cannot divide this data.
    """
    chosen = LIBRARY[name]
    known = set(inspect.signature(chosen).parameters)
    given = {"num_partitions": num_clients, "partition_by": "label", "seed": seed}
    merged = {key: value for key, value in given.items() if key in known} | options
    where = f"partition {name!r} with partition-options {options}"
    try:
        inspect.signature(chosen).bind(**merged)
        drawn = chosen(**merged)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}. Options: {listing(sorted(known), 20)}.") from error
    drawn.dataset = Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    try:
        if drawn.num_partitions != num_clients:
            raise ConfigError(
                f"{where} makes {drawn.num_partitions} clients, num-partitions is {num_clients}. "
                "Make the two equal."
            )
        parts = [np.asarray(drawn.load_partition(i)["row"]) for i in range(num_clients)]
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"{where} cannot divide {len(labels)} examples: {error}") from error
    return [np.sort(part).astype(np.int64) for part in parts]
