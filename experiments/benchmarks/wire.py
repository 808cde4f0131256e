"""Wire: bytes and encode/decode seconds of one training reply, by wire format."""

from __future__ import annotations

from functools import partial
from typing import get_args

import numpy as np
from flwr.app import RecordDict

from common.compression import Precision
from common.messages import DELTA, TrainReply
from common.records import Content, Header, Received, encode, payload_bytes
from experiments.benchmarks.measuring import Machine, Row, take_turns


def wire_part(num_parameters: int, machine: Machine, repeats: int) -> Row:
    """Measure every precision for a delta of `num_parameters` entries."""
    delta = np.random.default_rng(0).normal(0, 0.01, num_parameters).astype(np.float32)
    reply = Content(TrainReply(1, 0.0, 0.0).settings(), {DELTA: delta})
    rows: dict[str, Row] = {}
    for precision in get_args(Precision):
        encoding = partial(encode, Header("bench", "mh-pfedhn", 1, "nonce", precision), reply)
        content = encoding()
        decoding = partial(_decode, content, num_parameters)
        found = take_turns({"encode": encoding, "decode": decoding}, repeats)
        size, seconds = payload_bytes(content), found["encode"].best
        rows[precision] = {
            "bytes": size,
            "encode_seconds": seconds,
            "decode_seconds": found["decode"].best,
            **machine.bound(seconds, traffic=float(delta.nbytes + size)),
        }
    return {"rows": rows}


def _decode(content: RecordDict, num_parameters: int) -> None:
    received = Received(content)
    TrainReply.read(received, most=1)
    received.vector(DELTA, num_parameters)
