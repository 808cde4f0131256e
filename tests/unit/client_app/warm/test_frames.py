import json
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client_app.worker import frames
from client_app.worker.frames import Frame, decode, encode, peer_is_me, receive, send
from common.errors import WireError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(5.0)
        right.settimeout(5.0)
        yield left, right


def test_a_frame_arrives_as_it_was_sent(pair: Pair) -> None:
    send(pair[0], Frame({"kind": "x", "n": 3}, b"\x00\xff" * 1000))
    send(pair[0], Frame({"kind": "y"}))
    assert receive(pair[1]) == Frame({"kind": "x", "n": 3}, b"\x00\xff" * 1000)
    assert receive(pair[1]) == Frame({"kind": "y"}, b"")


def test_records_survive_the_trip_bit_for_bit() -> None:
    theta = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"theta": Array(theta)}),
            "config": ConfigRecord({"a": "text", "b": True, "c": 3, "d": 0.1}),
            "metrics": MetricRecord({"loss": 1.5, "counts": [1, 2]}),
        }
    )
    again = decode(encode(content))
    assert np.array_equal(again.array_records["arrays"]["theta"].numpy(), theta)
    assert dict(again.config_records["config"]) == {"a": "text", "b": True, "c": 3, "d": 0.1}
    assert dict(again.metric_records["metrics"]) == {"loss": 1.5, "counts": [1, 2]}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((1 << 21, 0), r"header has 2097152 bytes; the limit is 1048576"),
        ((2, 1 << 40), r"body has 1099511627776 bytes; the limit is 1073741824"),
    ],
)
def test_a_frame_that_claims_too_much_is_refused_unread(
    pair: Pair, sizes: tuple[int, int], text: str
) -> None:
    pair[0].sendall(struct.pack("!4sIQ", b"MHW1", *sizes))
    with pytest.raises(WireError, match=text):
        receive(pair[1])


def test_nothing_too_large_is_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_BODY_BYTES", 10)
    with pytest.raises(WireError, match="body has 11 bytes; the limit is 10"):
        send(pair[0], Frame({}, b"x" * 11))


def test_what_is_no_frame_is_refused(pair: Pair) -> None:
    pair[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(WireError, match=r"starts with b'GET '; expected b'MHW1'"):
        receive(pair[1])


def test_a_header_that_is_no_object_is_refused(pair: Pair) -> None:
    text = json.dumps([1]).encode()
    pair[0].sendall(struct.pack("!4sIQ", b"MHW1", len(text), 0) + text)
    with pytest.raises(WireError, match="header is list; expected an object"):
        receive(pair[1])


def test_a_frame_cut_short_says_how_far_it_came(pair: Pair) -> None:
    pair[0].sendall(struct.pack("!4sIQ", b"MHW1", 2, 100) + b"{}" + b"x" * 40)
    pair[0].close()
    with pytest.raises(ConnectionResetError, match="after 40 of 100 bytes"):
        receive(pair[1])


def test_the_peer_of_a_pair_is_this_user(pair: Pair) -> None:
    assert peer_is_me(pair[0])
