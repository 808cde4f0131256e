"""The one form of every message and reply, whatever the method, and its checked reading.

A message holds two records: `config`, with a header (protocol version, federation, method, round,
nonce, precision) and settings, and `arrays`, with vectors by name. A reply repeats the header of
the message that it answers. Both apps build and read Flower records here and nowhere else.

Whatever is read is checked: the kind and range of a setting, and of a vector the dtype, length and
finiteness of the bytes themselves, never of what is claimed about them. What does not fit raises a
WireError that says what was expected, what came and what to change; the caller adds from whom.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ValidationError

from common.compression import MODEL_ENTRIES, Float32, Precision, Raw, pack, unpack
from common.config.section import Scalar, Section
from common.errors import WireError, listing, unknown_name

PROTOCOL_VERSION = 3

CONFIG, ARRAYS = "config", "arrays"
COUNTS = "counts"
"""Vectors of this name are whole numbers and travel as float32 whatever the precision."""

LARGEST = 10**12
LONGEST_WORD = 64
"""No count, loss or duration is larger; sums of what is accepted stay finite."""
LARGEST_COUNT, MOST_ROUNDS = 2**24, 10**7
"""float32 holds whole numbers up to here exactly."""

Settings = Mapping[str, Scalar]
Arrays = Mapping[str, Float32]
V = TypeVar("V", bool, int, float, str)
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Header:
    """What every message carries, and its reply repeats. `nonce` is drawn for each message."""

    federation_id: str
    method: str
    server_round: int
    nonce: str
    precision: Precision = "float32"

    def settings(self) -> dict[str, Scalar]:
        """Return the keys that stand for it."""
        return {
            "protocol-version": PROTOCOL_VERSION,
            "federation-id": self.federation_id,
            "method": self.method,
            "server-round": self.server_round,
            "nonce": self.nonce,
            "precision": self.precision,
        }

    def require_repeated(self, reply: Header) -> None:
        """Raise WireError unless a reply answers the message with this header."""
        for key, expected in vars(self).items():
            found = getattr(reply, key)
            if found != expected:
                raise WireError(
                    f"it answers another message: {key.replace('_', '-')} is {found!r:.80}; "
                    f"expected {expected!r}. The client repeats an old reply, or made this one up."
                )


@dataclass(frozen=True)
class Content:
    """What a message says beside its header: settings, and vectors (P,) by name."""

    settings: Settings = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


def encode(header: Header, content: Content, *, top_k: float = 1) -> RecordDict:
    """Encode a message or a reply; `counts` travel as float32 whatever the precision.

    With `top_k` below 1 the entries of vectors that are not 0 travel alone
    (`common.compression`).
    """
    packed: dict[str, Array] = {}
    for name, x in content.arrays.items():
        precision = "float32" if name == COUNTS else header.precision
        packed |= {k: Array(raw) for k, raw in pack(name, x, precision, top_k=top_k).items()}
    config = ConfigRecord({**header.settings(), **content.settings})
    return RecordDict({CONFIG: config, ARRAYS: ArrayRecord(packed)})


def payload_bytes(content: RecordDict) -> int:
    """Count the bytes of all arrays in a message, as they travel."""
    arrays = (a for record in content.array_records.values() for a in record.values())
    return sum(len(a.data) for a in arrays if isinstance(a.data, bytes))


class Received:
    """A message or reply that came, read value by value; every read may raise WireError.

    Attributes
    ----------
    header : checked when this is made, the protocol version first.
    """

    def __init__(self, content: RecordDict) -> None:
        for name, kind in ((CONFIG, ConfigRecord), (ARRAYS, ArrayRecord)):
            if not isinstance(content.get(name), kind):
                raise WireError(f"record {name!r} is missing; got {listing(content) or 'none'}.")
        if len(content) > 2:
            raise WireError(
                f"there are other records than {CONFIG} and {ARRAYS}: {listing(content)}."
            )
        self._config = content.config_records[CONFIG]
        self._arrays = content.array_records[ARRAYS]
        self._unread = set(self._arrays)
        version = self.value("protocol-version", int)
        if version != PROTOCOL_VERSION:
            raise WireError(
                f"protocol version {version}; expected {PROTOCOL_VERSION}. Install the same "
                "mh-pfedhn release on the server and on every client."
            )
        precision = self.value("precision", str)
        if precision not in get_args(Precision):
            raise WireError(unknown_name("precision", precision[:80], get_args(Precision)))
        self.header = Header(
            federation_id=self.word("federation-id"),
            method=self.word("method"),
            server_round=self.count("server-round", most=MOST_ROUNDS),
            nonce=self.word("nonce"),
            precision=precision,  # type: ignore[arg-type]  # checked above
        )

    # --- settings --------------------------------------------------------------------------------

    def has_setting(self, key: str) -> bool:
        """Say whether there is such a key."""
        return key in self._config

    def value(self, key: str, kind: type[V]) -> V:
        """Return the value of a key that must be there and of exactly this type."""
        if key not in self._config:
            raise WireError(f"key {key!r} is missing; got {listing(self._config) or 'none'}.")
        value = self._config[key]
        if type(value) is not kind:
            raise WireError(f"{key} = {value!r:.80}; expected {kind.__name__}.")
        return value

    def word(self, key: str) -> str:
        """Return a short text without anything that a terminal or a file name would obey."""
        text = self.value(key, str)
        if len(text) > LONGEST_WORD or not text.isprintable():
            raise WireError(f"{key} = {text[:LONGEST_WORD]!r}; expected a word of a line.")
        return text

    def flag(self, key: str) -> bool:
        """Return a switch; it is off where it is not there."""
        return self.has_setting(key) and self.value(key, bool)

    def count(self, key: str, *, least: int = 0, most: int = LARGEST) -> int:
        """Return an int from `least` to `most`."""
        value = self.value(key, int)
        if not least <= value <= most:
            raise WireError(f"{key} = {value:.6g}; expected {least} to {most:,}.")
        return value

    def number(self, key: str, *, most: float) -> float:
        """Return a float from 0 to `most`."""
        value = self.value(key, float)
        if not 0 <= value <= most:
            raise WireError(f"{key} is {value}; expected a number from 0 to {most:g}.")
        return value

    def share(self, key: str, *, of: int) -> float:
        """Return an int or float from 0 to `of`."""
        if type(self._config.get(key)) is int:
            return self.count(key, most=of)
        return self.number(key, most=of)

    def section(self, section: type[S]) -> S:
        """Rebuild a config section from its keys."""
        values = {key: self._config[key] for key in section.key_names() if key in self._config}
        missing = section.key_names() - values.keys()
        if missing:
            raise WireError(f"key {listing(sorted(missing))} is missing.")
        try:
            return section.model_validate(values)
        except ValidationError as error:
            raise WireError(f"{error.errors()[0]['msg']}.") from error

    # --- vectors ---------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def vector(
        self, name: str, length: int, *, top_k: float = 1, meaning: str = MODEL_ENTRIES
    ) -> Float32:
        """Return a vector (length,), float32 and finite; see `common.compression.unpack`."""
        return unpack(name, self._raw, length=length, top_k=top_k, meaning=meaning)

    def counts(self, length: int) -> NDArray[np.int64]:
        """Return `counts` (length,): whole numbers from 0 to 2^24, not all zero."""
        x = self.vector(COUNTS, length, meaning="one entry for each class.")
        if ((x < 0) | (x > LARGEST_COUNT) | (x != np.floor(x))).any() or not x.any():
            raise WireError(
                f"counts must be whole numbers from 0 to {LARGEST_COUNT:,}, not all 0; got "
                f"{x.min():g} to {x.max():g}."
            )
        return x.astype(np.int64)

    def require_all_read(self) -> None:
        """Raise WireError when there are vectors that nobody asked for."""
        if self._unread:
            raise WireError(f"nobody asked for array {listing(sorted(self._unread))}.")

    def _raw(self, name: str) -> Raw:
        """Return an array, read-only, without allocating more than came."""
        if name not in self._arrays:
            raise WireError(f"array {name!r} is missing; got {listing(self._arrays) or 'none'}.")
        self._unread.discard(name)
        data = self._arrays[name].data
        try:
            stream = io.BytesIO(data[:256])
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("it is no .npy file of version 1.0")
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            raw: Raw = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
        except Exception as error:  # whatever numpy throws at bytes that a peer made up
            raise WireError(f"{name} cannot be read as an array: {error}.") from error
        return raw


def require_norm(x: Float32, name: str, most: float) -> None:
    """Raise WireError when the Euclidean norm of a change is beyond `max-delta-norm`."""
    norm = float(np.linalg.norm(x.astype(np.float64)))
    if norm > most:
        raise WireError(
            f"{name} has norm {norm:.3g}; at most {most:.3g} is accepted (max-delta-norm). "
            "Training diverged there, or the client is faulty."
        )
