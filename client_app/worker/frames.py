"""Frames between a message's process and the worker: magic, JSON header, raw body.

Both ends belong to one user on one machine, and still trust no length: a frame that claims more
than the limits is refused before anything of it is read. The body is Flower's own protobuf form of
a RecordDict; nothing here is executable when decoded.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from common.errors import WireError

MAGIC = b"MHW1"
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 30
_HEAD = struct.Struct("!4sIQ")
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Frame:
    """One frame: JSON-able header, and a body that may be empty."""

    header: dict[str, Any]
    body: bytes = b""


def send(connection: socket.socket, frame: Frame) -> None:
    """Write a frame.

    Raises
    ------
    WireError
        The frame is larger than the other side would accept.
    OSError
        The connection broke or timed out.
    """
    header = json.dumps(frame.header).encode()
    _check_sizes(len(header), len(frame.body))
    connection.sendall(_HEAD.pack(MAGIC, len(header), len(frame.body)) + header)
    if frame.body:
        connection.sendall(frame.body)


def receive(connection: socket.socket) -> Frame:
    """Read a frame.

    Raises
    ------
    WireError
        What came is no frame, or claims to be larger than a frame may be.
    OSError
        The connection ended (ConnectionError) or nothing came in its timeout (TimeoutError).
    """
    magic, header_bytes, body_bytes = _HEAD.unpack(_read(connection, _HEAD.size))
    if magic != MAGIC:
        raise WireError(f"worker frame starts with {magic!r}; expected {MAGIC!r}.")
    _check_sizes(header_bytes, body_bytes)
    try:
        header = json.loads(_read(connection, header_bytes))
    except ValueError as error:
        raise WireError(f"worker frame header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise WireError(f"worker frame header is {type(header).__name__}; expected an object.")
    return Frame(header, bytes(_read(connection, body_bytes)))


def _check_sizes(header_bytes: int, body_bytes: int) -> None:
    for name, size, limit in (
        ("header", header_bytes, MAX_HEADER_BYTES),
        ("body", body_bytes, MAX_BODY_BYTES),
    ):
        if size > limit:
            raise WireError(f"worker frame {name} has {size} bytes; the limit is {limit}.")


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if count == 0:
            raise ConnectionResetError(f"the connection ended after {done} of {size} bytes")
        done += count
    return data


def encode(content: RecordDict) -> bytes:
    """Return Flower's protobuf bytes of a RecordDict."""
    data: bytes = recorddict_to_proto(content).SerializeToString()
    return data


def decode(body: bytes) -> RecordDict:
    """Rebuild a RecordDict from Flower's protobuf bytes."""
    return recorddict_from_proto(ProtoRecordDict.FromString(body))


def peer_is_me(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this user (SO_PEERCRED; Linux)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return bool(uid == os.getuid())
