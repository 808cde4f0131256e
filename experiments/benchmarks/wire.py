"""Part (d): bytes and encode/decode seconds of one training reply, by wire format."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from common.compression import Precision
from common.records import payload_bytes
from common.wire import TrainReply, decode_train_reply, encode_train_reply
from experiments.benchmarks.machine import Machine
from experiments.benchmarks.timing import take_turns


def wire_table(num_parameters: int, machine: Machine, repeats: int) -> dict[str, dict[str, Any]]:
    """Measure every precision for a delta of `num_parameters` entries."""
    rng = np.random.default_rng(0)
    delta = rng.normal(0, 0.01, num_parameters).astype(np.float32)
    reply = TrainReply(num_examples=1, train_loss=0.0, seconds=0.0, delta=delta)
    return {name: _one(name, reply, machine, repeats) for name in get_args(Precision)}


def _one(precision: Precision, reply: TrainReply, machine: Machine, repeats: int) -> dict[str, Any]:
    assert reply.delta is not None
    size = reply.delta.size
    content = encode_train_reply(reply, precision)

    def decode() -> None:
        decode_train_reply(content, num_parameters=size, num_global_parameters=0, source="bench")

    found = take_turns(
        {"encode": lambda: encode_train_reply(reply, precision), "decode": decode}, repeats
    )
    num_bytes = payload_bytes(content)
    traffic = float(reply.delta.nbytes + num_bytes)
    return {
        "bytes": num_bytes,
        "encode_seconds": found["encode"].best,
        "decode_seconds": found["decode"].best,
        "bounds": machine.bound(found["encode"].best, traffic=traffic),
    }
