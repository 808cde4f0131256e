"""The share of one client: drawn once for a run, stored beside the images, read by all.

A stored partition is `partition-<hash>.npz`: all index arrays one after the other, and where each
begins. The hash covers everything that the draw depends on.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from client_app.data.cache import DecodedDataset, entry_lock
from client_app.data.catalogue import CATALOGUE, OWN
from client_app.data.splits import (
    Indices,
    numbered_anew,
    split_dirichlet,
    split_natural,
    split_pathological,
    split_three_ways,
    strata,
    thin_out,
)
from common.config import ClientSection
from common.errors import ConfigError, DataError, listing, unknown_name
from common.files import PRIVATE, replace_file
from common.seeding import numpy_generator

log = logging.getLogger(__name__)

FORMAT = 2
MOST_PARTITIONS = 32
"""Of one data set that are kept: each run's seed may draw another."""
WHOLE = "none"
PUBLISHED = ("pathological", "dirichlet")
NATURAL = "natural-id"
LIBRARY = {
    "iid": "IidPartitioner",
    "linear": "LinearPartitioner",
    "square": "SquarePartitioner",
    "exponential": "ExponentialPartitioner",
    "size": "SizePartitioner",
    "shard": "ShardPartitioner",
    "inner-dirichlet": "InnerDirichletPartitioner",
    "library-dirichlet": "DirichletPartitioner",
    "library-pathological": "PathologicalPartitioner",
}
"""Our names for the partitioners of flwr-datasets; importing that library costs seconds."""
PARTITION_NAMES: tuple[str, ...] = (WHOLE, *PUBLISHED, NATURAL, *LIBRARY)


def client_indices(
    dataset: DecodedDataset,
    section: ClientSection,
    *,
    partition_id: int,
    seed: int,
    cap: int | None = None,
) -> Indices:
    """Return the rows that one client owns, ascending (M_i,), at most `max-client-examples`.

    Which of them that are is drawn from `cap`, else from `seed`. With partition "none" a client
    owns all rows, whatever its partition_id. Raises ConfigError for a setting that cannot be used,
    DataError where the partition cannot be drawn from this data.
    """
    most = section.max_client_examples
    if most == 1:
        raise ConfigError(
            "max-client-examples = 1, but a client needs one example to train and one to test. Set "
            "it to 2 or more, or to 0 for everything that the client has."
        )
    rows = _share(dataset, section, partition_id, seed)
    if not most or len(rows) <= most:
        return rows
    client = _name(section, partition_id)
    rng = numpy_generator(seed if cap is None else cap, "max-client-examples", client_id=client)
    return rows[thin_out(numbered_anew(strata(dataset.labels[rows])), most=most, rng=rng)]


def client_parts(
    dataset: DecodedDataset,
    section: ClientSection,
    rows: Indices,
    *,
    partition_id: int,
    seed: int,
) -> tuple[Indices, Indices, Indices]:
    """Divide a client's rows (M,) into positions of train, validation and test examples.

    Groups are trained on or tested on as wholes, but where a client is one group, or a published
    data set is divided otherwise: it is compared with results on random test examples. Raises
    DataError where nothing is left to train or to test on.
    """
    mixed = section.partition == NATURAL or section.dataset in CATALOGUE
    try:
        return split_three_ways(
            numbered_anew(strata(dataset.labels[rows])),
            dataset.division.at(rows, keep_groups=not mixed),
            test_fraction=section.test_fraction,
            validation_fraction=section.validation_fraction,
            rng=numpy_generator(seed, "train-test", client_id=_name(section, partition_id)),
        )
    except DataError as error:
        raise DataError(f"{section.dataset}, client {partition_id}: {error}") from error


def _name(section: ClientSection, partition_id: int) -> str:
    return WHOLE if section.partition == WHOLE else str(partition_id)


def _share(
    dataset: DecodedDataset, section: ClientSection, partition_id: int, seed: int
) -> Indices:
    """Return all rows of one client: read, or drawn and stored for everybody."""
    if section.partition == WHOLE:
        return np.arange(len(dataset.labels), dtype=np.int64)
    settings, count = _settings(section), section.num_partitions
    if not 0 <= partition_id < count:
        raise ConfigError(
            f"partition-id = {partition_id} is not in 0..{count - 1} (num-partitions = {count}). "
            "A participant with data of its own sets partition = 'none' instead."
        )
    digest = hashlib.sha256(json.dumps([FORMAT, settings, count, seed]).encode()).hexdigest()
    path = dataset.folder / f"partition-{digest[:16]}.npz"
    share = _read_share(path, partition_id)
    if share is None:
        with entry_lock(dataset.folder):
            share = _read_share(path, partition_id)
            if share is None:
                parts = _draw(_divided_by(dataset, section), settings, count, seed)
                _write_parts(path, parts)
                share = parts[partition_id]
    return share


def _divided_by(dataset: DecodedDataset, section: ClientSection) -> Indices:
    """Return what a partition is drawn by (M,): classes, or the groups that the data name."""
    if section.partition == NATURAL:
        if dataset.division.groups is None:
            raise DataError(
                f"partition = {NATURAL!r} gives each client one group, and {section.dataset} names "
                "none. Data sets with groups: femnist, camelyon17, iwildcam, har; a function of "
                "your own returns a dict of inputs, labels and groups."
            )
        return dataset.division.groups
    if dataset.labels.ndim > 1 and section.partition in PUBLISHED:
        raise DataError(
            f"partition = {section.partition!r} divides by class, and the labels of "
            f"{section.dataset} are no classes. Set partition = 'iid'."
        )
    return strata(dataset.labels)


def _settings(section: ClientSection) -> dict[str, Any]:
    """Return what a draw depends on, with the published values filled in."""
    name, spec = section.partition, CATALOGUE.get(section.dataset, OWN)
    if name not in PARTITION_NAMES:
        raise ConfigError(unknown_name("partition", name, PARTITION_NAMES))
    options = _options(section)
    if name in LIBRARY:
        return {"partition": name, "options": options}
    if options:
        raise ConfigError(
            f"partition {name!r} takes no partition-options, got {options}. Its settings are "
            "classes-per-client, dirichlet-alpha and min-client-examples."
        )
    if name == NATURAL:
        return {"partition": name}
    if name == "pathological":
        count = section.classes_per_client or spec.classes_per_client
        return {"partition": name, "classes_per_client": count}
    alpha = section.dirichlet_alpha or spec.dirichlet_alpha
    return {"partition": name, "alpha": alpha, "min_examples": section.min_client_examples}


def _options(section: ClientSection) -> dict[str, Any]:
    text = section.partition_options
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"partition-options = {text!r} is not JSON: {error}.") from error
    if not isinstance(options, dict):
        raise ConfigError(
            f"partition-options = {text!r} must be a JSON object, for instance "
            '{"num_shards_per_partition": 2}.'
        )
    return options


def _draw(labels: Indices, settings: dict[str, Any], num_clients: int, seed: int) -> list[Indices]:
    """Draw the rows of every client; each has two or more. Labels: as `_divided_by`."""
    name, given = settings["partition"], {k: v for k, v in settings.items() if k != "partition"}
    if 2 * num_clients > len(labels):
        raise DataError(
            f"{num_clients} clients need at least {2 * num_clients} examples (one to train and "
            f"one to test each), the data has {len(labels)}. Use fewer clients (num-partitions)."
        )
    rng = numpy_generator(seed, "partition")
    if name == "pathological":
        parts = split_pathological(labels, num_clients=num_clients, rng=rng, **given)
    elif name == NATURAL:
        parts = split_natural(labels, num_clients=num_clients, rng=rng, **given)
    elif name == "dirichlet":
        parts = split_dirichlet(labels, num_clients=num_clients, rng=rng, **given)
    else:
        parts = split_by_library(name, labels, num_clients=num_clients, seed=seed, **given)
    sizes = [len(part) for part in parts]
    if min(sizes) < 2:
        raise DataError(
            f"{name}: client {sizes.index(min(sizes))} of {num_clients} would have {min(sizes)} "
            "example(s); every client needs one to train and one to test. The data allows fewer "
            "clients than num-partitions with these settings: use fewer clients, or give each "
            "more classes."
        )
    log.info("%s: %d clients, %d to %d examples", name, num_clients, min(sizes), max(sizes))
    return parts


def split_by_library(
    name: str, labels: Indices, *, num_clients: int, seed: int, options: dict[str, Any]
) -> list[Indices]:
    """Draw a partition with a partitioner of flwr-datasets, by one of the names in `LIBRARY`.

    The number of clients, the seed and the label column are filled in where the partitioner takes
    them and `options` does not have them. Raises ConfigError where the options are not those of the
    partitioner, or give another number of clients, DataError where it cannot divide this data.
    """
    from datasets import Dataset
    from flwr_datasets import partitioner as library

    signature = inspect.signature(chosen := getattr(library, LIBRARY[name]))
    known = signature.parameters.keys()
    filled = {"num_partitions": num_clients, "partition_by": "label", "seed": seed}
    merged = {key: value for key, value in filled.items() if key in known} | options
    where = f"partition {name!r} with partition-options {options}"
    try:
        signature.bind(**merged)
        drawn = chosen(**merged)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}. Options: {listing(sorted(known), 20)}.") from error
    # some go by order, and rows often come class by class
    order = numpy_generator(seed, "partition-order").permutation(len(labels))
    drawn.dataset = Dataset.from_dict({"label": labels[order], "row": order})
    try:
        if drawn.num_partitions != num_clients:
            raise DataError(
                f"{where} makes {drawn.num_partitions} clients, num-partitions is {num_clients}. "
                "Make the two equal."
            )
        parts = [np.asarray(drawn.load_partition(i)["row"]) for i in range(num_clients)]
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"{where} cannot divide {len(labels)} examples: {error}") from error
    return [np.sort(part).astype(np.int64) for part in parts]


def _read_share(path: Path, partition_id: int) -> Indices | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            starts = stored["starts"]
            rows: Indices = stored["rows"][starts[partition_id] : starts[partition_id + 1]]
            return rows
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, EOFError) as error:
        log.warning("%s is damaged (%s); drawing the partition again", path, error)
        return None


def _write_parts(path: Path, parts: list[Indices]) -> None:
    starts = np.cumsum([0, *(len(part) for part in parts)])
    packed = io.BytesIO()
    np.savez(packed, rows=np.concatenate(parts), starts=starts)
    replace_file(path, packed.getvalue(), mode=PRIVATE)
    found = [(p.stat().st_mtime_ns, p) for p in path.parent.glob("partition-*.npz") if p != path]
    for _, old in sorted(found)[: -(MOST_PARTITIONS - 1)]:
        old.unlink(missing_ok=True)
