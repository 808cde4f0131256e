"""Wire: bytes and encode/decode seconds of one training reply, by wire format."""

from __future__ import annotations

from functools import partial
from typing import get_args

import numpy as np

from common.compression import Precision
from common.records import payload_bytes
from common.wire import TrainReply, decode_train_reply, encode_train_reply
from experiments.benchmarks.measuring import Machine, Row, take_turns


def wire_part(num_parameters: int, machine: Machine, repeats: int) -> Row:
    """Measure every precision for a delta of `num_parameters` entries."""
    delta = np.random.default_rng(0).normal(0, 0.01, num_parameters).astype(np.float32)
    reply = TrainReply(num_examples=1, train_loss=0.0, seconds=0.0, delta=delta)
    rows: Row = {}
    for precision in get_args(Precision):
        encode = partial(encode_train_reply, reply, precision)
        content = encode()
        decode = partial(
            decode_train_reply,
            content,
            num_parameters=num_parameters,
            num_global_parameters=0,
            source="bench",
        )
        found = take_turns({"encode": encode, "decode": decode}, repeats)
        size, seconds = payload_bytes(content), found["encode"].best
        rows[precision] = {
            "bytes": size,
            "encode_seconds": seconds,
            "decode_seconds": found["decode"].best,
            "bounds": machine.bound(seconds, traffic=float(delta.nbytes + size)),
        }
    return rows
