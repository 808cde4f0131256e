"""Messages of the baselines: named vectors both ways, beside the same counts as everywhere.

They travel under the message types of `common.wire` and are checked by the same functions. Which
vectors a message holds, and how long they are, is each baseline's own affair: it reads them from a
`Parcel` by name and length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from common import wire
from common.compression import Float32, Precision
from common.config import TrainingSection
from common.errors import WireError
from common.records import (
    ARRAYS,
    CONFIG,
    METRICS,
    MODEL_ENTRIES,
    arrays_of,
    config_of,
    count_of,
    decode_vector,
    encode_vector,
    metrics_of,
    number_of,
    section_of,
    value_of,
)
from common.wire import Evaluation, Header

Arrays = Mapping[str, Float32]

COUNTS = "counts"
"""Vectors of this name are whole numbers and travel as float32 whatever the precision."""

MOST = 2**24
"""float32 holds whole numbers up to here exactly."""


@dataclass(frozen=True)
class Parcel:
    """The vectors of a received message, decoded and checked when they are asked for.

    `source` starts every error message, as in `common.records`.
    """

    arrays: ArrayRecord
    source: str

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def vector(self, name: str, length: int, *, meaning: str = MODEL_ENTRIES) -> Float32:
        """Decode a vector (length,), float32 and finite.

        Raises
        ------
        WireError
            It is missing, or of another dtype, length or not finite.
        """
        return decode_vector(self.arrays, name, length=length, source=self.source, meaning=meaning)

    def counts(self, length: int) -> NDArray[np.int64]:
        """Decode the counts (length,): whole numbers from 0 to 2^24, not all zero.

        Raises
        ------
        WireError
            They are missing or something else.
        """
        x = self.vector(COUNTS, length, meaning="one entry for each class.")
        if ((x < 0) | (x > MOST) | (x != np.floor(x))).any() or not x.any():
            raise WireError(
                f"{self.source}: counts must be whole numbers from 0 to {MOST:,}, not all 0; got "
                f"{x.min():g} to {x.max():g}."
            )
        return x.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """What a client of a baseline is to do. `training` comes with training messages only."""

    header: Header
    parcel: Parcel
    training: TrainingSection | None = None
    evaluate: bool = False


@dataclass(frozen=True)
class Work:
    """What a client of a baseline did in one round."""

    num_examples: int
    train_loss: float
    seconds: float
    evaluation: Evaluation | None = None


def _encode_arrays(arrays: Arrays, precision: Precision) -> ArrayRecord:
    encoded: dict[str, Array] = {}
    for name, x in arrays.items():
        encoded |= encode_vector(name, x, "float32" if name == COUNTS else precision)
    return ArrayRecord(encoded)


def encode_order(
    header: Header,
    arrays: Arrays,
    *,
    training: TrainingSection | None = None,
    evaluate: bool = False,
) -> RecordDict:
    """Encode `train.personal` (with `training`), `evaluate.personal` or `query.finish`."""
    config = wire.header_config(header) | {"evaluate": evaluate}
    if training is not None:
        config |= training.flat()
    return RecordDict(
        {CONFIG: ConfigRecord(config), ARRAYS: _encode_arrays(arrays, header.precision)}
    )


def decode_order(content: RecordDict, source: str, *, trains: bool = False) -> Order:
    """Decode a message of a baseline's server; `trains` says that it must bring `training`."""
    config = config_of(content, source)
    return Order(
        header=wire.decode_header(content, source),
        parcel=Parcel(arrays_of(content, source), source),
        training=section_of(TrainingSection, config, source) if trains else None,
        evaluate=value_of(config, "evaluate", bool, source),
    )


def encode_work(work: Work, arrays: Arrays, precision: Precision) -> RecordDict:
    """Encode the reply to `train.personal`."""
    metrics: dict[str, int | float] = {
        "num-examples": work.num_examples,
        "train-loss": work.train_loss,
        "seconds": work.seconds,
    }
    if work.evaluation is not None:
        metrics |= wire.evaluation_metrics(work.evaluation)
    return RecordDict(
        {METRICS: MetricRecord(dict(metrics)), ARRAYS: _encode_arrays(arrays, precision)}
    )


def decode_work(
    content: RecordDict, source: str, others: Iterable[str] = ()
) -> tuple[Work, Parcel]:
    """Decode the reply to `train.personal`; its vectors are checked when the parcel is read."""
    metrics = metrics_of(content, source)
    tested = "num-test" in metrics
    work = Work(
        num_examples=count_of(metrics, "num-examples", 1, source),
        train_loss=number_of(metrics, "train-loss", source),
        seconds=number_of(metrics, "seconds", source),
        evaluation=wire.decode_evaluation(content, source, others) if tested else None,
    )
    return work, Parcel(arrays_of(content, source), source)
