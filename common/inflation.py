"""Flower puts a message together from pieces that a peer sent; here within bounds, and one by one.

A piece names those that it is made of, and a few bytes can name one piece a thousand times; nothing
is put together before its size is known. Flower pulls several replies in one call, and one that
cannot be put together ends that call and loses the others, which the SuperLink has forgotten by
then: here it becomes a reply with an error.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ConfigRecord, Error, Message, Metadata, MetricRecord
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from common.errors import WireError

METADATA = (
    *("run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id"),
    *("group_id", "created_at", "ttl"),
)
SETTINGS = (ConfigRecord.__name__, MetricRecord.__name__)
GRID = "flwr.superlink.grid.http_grid"
PATIENCE_S = 30.0
"""For pieces that a peer has announced and not sent; the whole server waits meanwhile."""
LARGEST_HEAD = 2**20
"""Bytes of what says how an array is put together; a hundred thousand pieces fit in."""
LARGEST_SETTINGS = 2**16
"""Bytes of settings: as Python's objects they take twenty times as many."""

Pull = Callable[[str], bytes]


def bound_replies(most_bytes: Callable[[], int]) -> None:
    """Let no reply that Flower's grid pulls in this process have more bytes than `most_bytes()`.

    Flower has no setting for it: the two functions that its grid calls are replaced. Nothing is
    done in a process without such a grid.
    """
    if (grid := sys.modules.get(GRID)) is None:
        return
    pull, inflate = inflatable_utils.pull_objects, inflatable_utils.inflate_object_from_contents

    def pull_bounded(object_ids: list[str], pull_object_fn: Pull, **options: Any) -> Any:
        options.setdefault("max_time", PATIENCE_S)
        return pull(object_ids, counted(pull_object_fn, most_bytes()), **options)

    def inflate_bounded(object_id: str, contents: dict[str, bytes], **options: Any) -> Any:
        head = contents[object_id]
        try:
            require_size(contents, most_bytes())
            return inflate(object_id, contents, **options)
        except Exception as error:  # a peer made the pieces up: whatever they make Flower raise
            return _reply_with_error(head, f"{type(error).__name__}: {error}")

    vars(grid).update(pull_objects=pull_bounded, inflate_object_from_contents=inflate_bounded)


def counted(pull: Pull, most_bytes: int) -> Pull:
    """Let the pieces of one reply have so many bytes together; then raise ObjectPullError."""
    left, lock = most_bytes, threading.Lock()

    def pull_counted(object_id: str) -> bytes:  # by several threads
        nonlocal left
        content = pull(object_id)
        with lock:
            left -= len(content)
        if left < 0:
            raise ObjectPullError(object_id, f"the reply has more than {most_bytes:,} bytes")
        return content

    return pull_counted


def require_size(contents: Mapping[str, bytes], most_bytes: int) -> None:
    """Raise WireError where pieces, put together, would have more than `most_bytes`."""
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        most = LARGEST_SETTINGS if kind in SETTINGS else LARGEST_HEAD
        if kind != ArrayChunk.__name__ and len(content) > most:
            raise WireError(f"its {kind:.20} has {len(content):,} bytes; {most:,} are enough.")
        if kind != Array.__name__:
            continue
        places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        total += sum(len(contents[children[place]]) for place in places)
        if total > most_bytes:
            raise WireError(
                f"put together it has more than the {most_bytes:,} bytes that a reply may have."
            )


def _reply_with_error(content: bytes, reason: str) -> Message:
    """Make the reply that a reply is taken for that cannot be put together.

    Where not even what it answers can be read, it answers nothing: its client has not replied.
    """
    try:
        proto = ProtoMessage.FromString(get_object_body(content, Message)).metadata
    except Exception:  # made up as well
        proto = ProtoMetadata()
    error = Error(ErrorCode.MESSAGE_UNAVAILABLE, f"it cannot be put together: {reason:.300}")
    fields = {name: getattr(proto, name) for name in METADATA} | {
        "message_type": SYSTEM_MESSAGE_TYPE
    }
    return make_message(Metadata(**fields), error=error)
