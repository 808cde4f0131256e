"""Replies that somebody spoiled at random, of every message and method, at the one reader of all.

Whatever comes is accepted or refused with a reason; nothing else happens, and nothing that is read
costs much more memory than came. `MH_PFEDHN_FUZZ=100000` tries so many; the suite some.
"""

import os
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from common.methods import METHODS
from server_app.transport import Arrival, Transport
from tests.support.deployment import REPOSITORY
from tests.support.tiny import run_tiny, tiny_config

TRIES = int(os.environ.get("MH_PFEDHN_FUZZ", "1500"))
MUCH = 4 * 2**20
NUMBERS = (-1, 0, 2**31, 2**63 - 1, 1e308, -1e-300, float("inf"), float("nan"), 10**12, True)
THINGS: tuple[Any, ...] = (*NUMBERS, "", "x" * 5000, b"\xff\xfe", [1, 2], [0.5], ["a"], [b"x"])


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    """A .npy file of version 1.0 that says of itself what it likes."""
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


FILES = (
    b"", b"PK\x03\x04" + bytes(60), b"PK\x05\x06" + bytes(18), b"\x80\x04N.",
    b"\x93NUMPY\x02\x00\xff", npy("__import__('os').system('false')", "(1,)"),
    npy("'<f4'", "(1099511627776,)"), npy("'<f4'", "(-1,)"), npy("'<f4'", "(4, 'x')"),
    npy("'|O'", "(1,)", b"\x80\x04N."), npy("[('a', '<f4')]", "(3,)", bytes(12)),
    npy("'<f4'", "()", bytes(4)), npy("'<c8'", "(2,)", bytes(16)), npy("'<U9'", "(1,)", bytes(36)),
    npy("'<f4'", "(0,)"), npy("'<m8[s]'", "(1,)", bytes(8)), npy("'V0'", "(9999999999,)"),
    npy("'<f4'", "(" + "1," * 3000 + ")", bytes(4)),
)  # fmt: skip


def spoil_bits(content: RecordDict, draw: random.Random) -> RecordDict:
    """Flip a few bits of the bytes as they travel; Flower may refuse to read them."""
    data = bytearray(recorddict_to_proto(content).SerializeToString())
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return recorddict_from_proto(ProtoRecordDict.FromString(bytes(data)))


def spoil_setting(content: RecordDict, draw: random.Random) -> RecordDict:
    config = dict(content.config_records["config"])
    name = draw.choice([*config, "num-test", "num-correct-alone", "group", "x" * 99])
    if draw.random() < 0.3:
        config.pop(name, None)
    else:
        config[name] = draw.choice(THINGS)
    return RecordDict({"config": ConfigRecord(config), "arrays": content["arrays"]})


def spoil_array(content: RecordDict, draw: random.Random) -> RecordDict:
    arrays = dict(content.array_records["arrays"])
    name = draw.choice([*arrays, "delta", "delta-indices", "delta-scales", "counts", "nobody"])
    match draw.randrange(4):
        case 0:
            arrays.pop(name, None)
        case 1:
            shape, stype = draw.choice([[1], [], [-1], [2**40]]), draw.choice(["numpy.ndarray", ""])
            arrays[name] = Array("float32", shape, stype, draw.choice(FILES))
        case 2:
            kinds = (np.float64, np.int8, np.uint16, np.float16, np.bool_, np.complex64)
            arrays[name] = Array(np.zeros(draw.choice([0, 1, 7, 300]), draw.choice(kinds)))
        case 3 if name in arrays:
            value = arrays[name].numpy().copy()
            value.reshape(-1)[:1] = draw.choice([np.nan, np.inf, 3e38])
            arrays[name] = Array(value)
    return RecordDict({"config": content["config"], "arrays": ArrayRecord(arrays)})


def spoil_records(content: RecordDict, draw: random.Random) -> RecordDict:
    records: dict[str, Any] = dict(content)
    name = draw.choice(["config", "arrays", "more"])
    new = draw.choice([ConfigRecord(), ArrayRecord(), MetricRecord({"a": 1}), None])
    records.pop(name, None)
    return RecordDict(records if new is None else {**records, name: new})


def documented() -> set[str]:
    """The names in docs/privacy.md of all that may leave a participant."""
    text = (REPOSITORY / "docs" / "privacy.md").read_text()
    _, _, section = text.partition("### By name")
    return set(re.findall(r"`([a-z-]+)`", section.partition("\n#")[0]))


SPOILERS = (spoil_bits, spoil_setting, spoil_setting, spoil_array, spoil_array, spoil_records)


class Fuzz:
    """Stands before the transport's reader, and tries spoiled copies of all that it is to read."""

    def __init__(self, tries_each: int) -> None:
        self.tries_each, self.draw = tries_each, random.Random(7)
        self.outcomes: Counter[str] = Counter()
        self.names: set[str] = set()
        self.read = Transport.read

    def __call__(self, transport: Transport, arrival: Arrival, read: Callable[..., Any]) -> Any:
        if arrival.content is not None:
            records = arrival.content["config"], arrival.content["arrays"]
            self.names |= {name for record in records for name in record}  # type: ignore[union-attr]
            kept = (transport.rejected.copy(), transport.recent.copy(), set(transport.misfits))
            for _ in range(self.tries_each):
                self.attempt(transport, arrival, read)
            transport.rejected, transport.recent, transport.misfits = kept
        return self.read(transport, arrival, read)

    def attempt(self, transport: Transport, arrival: Arrival, read: Callable[..., Any]) -> None:
        try:
            content = self.draw.choice(SPOILERS)(arrival.content, self.draw)  # type: ignore[arg-type]
        except Exception:  # Flower refuses it before anybody reads it
            self.outcomes["unreadable"] += 1
            return
        before = sum(transport.rejected.values())
        tracemalloc.reset_peak()
        start, _ = tracemalloc.get_traced_memory()
        found = self.read(transport, Arrival(arrival.pending, content), read)
        assert tracemalloc.get_traced_memory()[1] - start < MUCH
        refused = sum(transport.rejected.values()) - before
        assert (found is None) == (refused == 1)
        self.outcomes["refused" if refused else "accepted"] += 1


@pytest.mark.parametrize("method", METHODS)
def test_whatever_comes_is_accepted_or_refused(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "method": method, "rounds": 1, "validation_fraction": 0.1, "measure_alone": True,
        "models": "tests.support.tiny:small", "uplink_top_k": 0.5 if method == "mh-pfedhn" else 1.0,
        "wire_precision": "float16",
    }  # fmt: skip
    fuzz = Fuzz(max(1, TRIES // len(METHODS) // 24))
    monkeypatch.setattr(Transport, "read", lambda *arguments: fuzz(*arguments))
    monkeypatch.setattr("server_app.transport.logger.warning", lambda *_: None)
    tracemalloc.start()
    try:
        run_tiny(tiny_config(tmp_path, **settings))
    finally:
        tracemalloc.stop()
    assert fuzz.outcomes["refused"] > 20
    assert (tmp_path / "run/summary.json").is_file()
    assert fuzz.names <= documented(), "docs/privacy.md does not name all that leaves"
    print(method, dict(fuzz.outcomes))
