"""Checked reading of Flower records: every value by name, kind, range, shape and finiteness.

Each function takes `source`, words such as "train.personal reply of client 3 in round 7", that
start its error message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError

from common.compression import (
    WIRE_DTYPES,
    Float32,
    Precision,
    from_bfloat16,
    from_scaled_float16,
    num_blocks,
    to_bfloat16,
    to_scaled_float16,
)
from common.config.section import Section
from common.errors import WireError, listing

CONFIG, ARRAYS, METRICS = "config", "arrays", "metrics"
_SCALES = "-scales"

LARGEST = 10**12
"""No count, loss or duration is larger; sums of what is accepted stay finite."""


def encode_vector(name: str, x: Float32, precision: Precision) -> dict[str, Array]:
    """Encode x (P,) under `name`; float16 adds its scales under `<name>-scales`."""
    if precision == "bfloat16":
        return {name: Array(to_bfloat16(x))}
    if precision == "float16":
        values, scales = to_scaled_float16(x)
        return {name: Array(values), name + _SCALES: Array(scales)}
    return {name: Array(np.ascontiguousarray(x, dtype=np.float32))}


MODEL_ENTRIES = (
    "one entry for each trainable parameter of the client's model. Did the model change after "
    "registration?"
)


def decode_vector(
    arrays: ArrayRecord,
    name: str,
    *,
    length: int | None,
    source: str,
    meaning: str = MODEL_ENTRIES,
) -> Float32:
    """Decode the vector `name` and check it; `length` None accepts any length above 0.

    `meaning` ends the message about a wrong length: what the entries stand for.

    Raises
    ------
    WireError
        The array is missing, cannot be read, or has a wrong dtype, shape, length or value.
    """
    raw = read_array(arrays, name, source)
    precision = WIRE_DTYPES.get(str(raw.dtype))
    if precision is None:
        raise WireError(
            f"{source}: {name} has dtype {raw.dtype}; expected {listing(WIRE_DTYPES)}. "
            "Convert it to float32 before it is sent."
        )
    if raw.ndim != 1 or raw.size == 0 or (length is not None and raw.size != length):
        wanted = f"({length},)" if length is not None else "a non-empty vector"
        raise WireError(f"{source}: {name} has shape {raw.shape}; expected {wanted}, {meaning}")
    x = _to_float32(arrays, name, raw, precision, source)
    if not np.isfinite(x).all():
        bad = int(np.count_nonzero(~np.isfinite(x)))
        raise WireError(
            f"{source}: {name} has {bad} of {x.size} entries that are NaN or infinite. "
            "Training diverged there: lower the learning rate or check that client's data."
        )
    return x


def read_array(arrays: ArrayRecord, name: str, source: str) -> np.ndarray[Any, Any]:
    """Return an array that must be there, whatever it holds; raise WireError where it is not."""
    if name not in arrays:
        raise WireError(f"{source}: array {name!r} is missing; got {listing(arrays) or 'none'}.")
    try:
        return arrays[name].numpy()
    except Exception as error:  # whatever numpy's reader throws at bytes a peer made up
        raise WireError(f"{source}: {name} cannot be read as an array: {error}.") from error


def _to_float32(
    arrays: ArrayRecord, name: str, raw: np.ndarray[Any, Any], precision: Precision, source: str
) -> Float32:
    if precision == "bfloat16":
        return from_bfloat16(raw)
    if precision == "float16":
        scales = read_array(arrays, name + _SCALES, source)
        if scales.dtype != np.float32 or scales.shape != (num_blocks(raw.size),):
            raise WireError(
                f"{source}: {name}{_SCALES} is {scales.dtype} {scales.shape}; "
                f"expected float32 ({num_blocks(raw.size)},)."
            )
        return from_scaled_float16(raw, scales)
    return cast(Float32, raw)


def payload_bytes(content: RecordDict) -> int:
    """Count the bytes of all arrays in a message, as they travel."""
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())


V = TypeVar("V", bool, int, float, str)
S = TypeVar("S", bound=Section)


def config_of(content: RecordDict, source: str) -> ConfigRecord:
    """Return the config record."""
    return cast(ConfigRecord, _record(content.config_records, CONFIG, source))


def arrays_of(content: RecordDict, source: str) -> ArrayRecord:
    """Return the array record."""
    return cast(ArrayRecord, _record(content.array_records, ARRAYS, source))


def metrics_of(content: RecordDict, source: str) -> MetricRecord:
    """Return the metric record."""
    return cast(MetricRecord, _record(content.metric_records, METRICS, source))


def _record(records: Mapping[str, Any], name: str, source: str) -> Any:
    if name not in records:
        raise WireError(
            f"{source}: record {name!r} is missing; got {listing(records) or 'none'} of its kind."
        )
    return records[name]


def value_of(config: Mapping[str, Any], key: str, kind: type[V], source: str) -> V:
    """Return the value of a key that must be there and of exactly this type."""
    if key not in config:
        raise WireError(f"{source}: key {key!r} is missing; got {listing(config) or 'none'}.")
    value = config[key]
    if type(value) is not kind:
        raise WireError(f"{source}: {key} = {value!r}; expected {kind.__name__}.")
    return value


def count_of(metrics: Mapping[str, Any], key: str, least: int, source: str) -> int:
    """Return an int of at least `least`."""
    value = value_of(metrics, key, int, source)
    if not least <= value <= LARGEST:
        raise WireError(f"{source}: {key} = {value}; expected {least} to {LARGEST:g}.")
    return value


def number_of(metrics: Mapping[str, Any], key: str, source: str) -> float:
    """Return a finite float."""
    value = value_of(metrics, key, float, source)
    if not abs(value) <= LARGEST:
        raise WireError(f"{source}: {key} is {value}; expected a finite number up to {LARGEST:g}.")
    return value


def optional_vector(
    arrays: ArrayRecord, name: str, length: int | None, source: str
) -> Float32 | None:
    """Decode a vector that may be absent."""
    if name not in arrays:
        return None
    return decode_vector(arrays, name, length=length, source=source)


def section_of(section: type[S], config: Mapping[str, Any], source: str) -> S:
    """Rebuild a config section from its keys in a record."""
    values = {key: config[key] for key in section.key_names() if key in config}
    missing = section.key_names() - values.keys()
    if missing:
        raise WireError(f"{source}: key {listing(sorted(missing))} is missing.")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise WireError(f"{source}: {error.errors()[0]['msg']}.") from error
