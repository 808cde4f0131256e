"""Replies come in pieces that a peer sent: within bounds, one by one, and without waiting.

Flower's grid waits for the pieces of one reply while all others wait for it, ends the whole call
over one that cannot be put together, and loses the rest, which the SuperLink has forgotten by then.
It also hands out messages that answer nothing. A piece names those that it is made of, and a few
bytes can name one piece a thousand times.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    inflate_object_from_contents,
)

from common.errors import WireError
from common.messages import LARGEST_REPLY

GRID = "flwr.superlink.grid.http_grid"
PATIENCE_S = 120.0
"""For the next piece of a reply that was announced; nobody else waits for it meanwhile."""
AT_ONCE = 4
"""Pieces of one reply that are fetched at the same time."""
PIECE, FEW = 2**20, 64
"""A reply has at most one piece for each of so many bytes that it may have, and a few more."""
LARGEST_HEAD = 2**20
"""Bytes of what says how an array is put together; a hundred thousand pieces fit in."""
LARGEST = {"ConfigRecord": 2**16, "MetricRecord": 2**16, "ArrayRecord": 2**14, "RecordDict": 2**14}
"""Bytes of settings, which are twenty times as many as Python's objects, and of lists of names: one
array can be named a thousand times."""

LOST = (OSError, httpx.HTTPError)
"""What a grid raises whose SuperLink is gone; whatever else it raises is a reply's own fault."""
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Between tries of what a SuperLink stumbles over, or is too busy for."""
T = TypeVar("T")

MostBytes = Callable[[str], int | None]
"""How many bytes the reply to a message may have; None where no reply is wanted."""
Pull = Callable[[str], bytes]


def is_lost(error: Exception) -> bool:
    """Whether a SuperLink is gone; one that stumbled over what a peer has sent it is there."""
    return isinstance(error, LOST) and not _stumbled(error)


def _stumbled(error: Exception) -> bool:
    status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
    return status == httpx.codes.INTERNAL_SERVER_ERROR


def again(call: Callable[[], T], failed: Exception, sleep: Callable[[float], None]) -> T:
    """Call again after pauses, where a SuperLink stumbled; raise what the last try raises."""
    for pause in PAUSES_S:
        if not _stumbled(failed):
            break
        sleep(pause)
        try:
            return call()
        except Exception as error:
            failed = error
    raise failed


@dataclass
class Announced:
    """A reply that was announced, and the pieces of it that are here."""

    reply_to: str
    message_id: str
    run_id: int
    most_bytes: int
    wanted: list[str]
    since: float
    here: dict[str, bytes] = field(default_factory=dict)

    def fetch(self, pull: Pull, pool: ThreadPoolExecutor, now: float) -> bool:
        """Fetch pieces until one is not there yet; return whether all are here.

        Raises WireError where they are too many or too large, or none has come for too long.
        """
        if len(self.wanted) > FEW + self.most_bytes // PIECE:
            raise WireError(f"it has {len(self.wanted)} pieces.")
        while missing := [name for name in self.wanted if name not in self.here][:AT_ONCE]:
            contents = list(pool.map(lambda name: _pulled(pull, name), missing))
            came = {n: c for n, c in zip(missing, contents, strict=True) if c is not None}
            self.here |= came
            self.since = now if came else self.since
            if sum(map(len, self.here.values())) > self.most_bytes:
                raise WireError(f"the reply has more than {self.most_bytes:,} bytes.")
            if now - self.since > PATIENCE_S:
                raise WireError(f"a piece was announced and did not come in {PATIENCE_S:g} s.")
            if len(came) < len(missing):
                return False
        return True

    def put_together(self) -> Message:
        """Return the reply; raise whatever the pieces make Flower raise."""
        require_size(self.here, self.most_bytes)
        found = inflate_object_from_contents(self.message_id, dict(self.here))
        if not isinstance(found, Message):
            raise WireError(f"it is a {type(found).__name__}, not a message.")
        if found.metadata.reply_to_message_id != self.reply_to:
            raise WireError("it says of itself that it answers another message.")
        found.metadata.__dict__["_message_id"] = self.message_id
        return found

    def refused(self, reason: str) -> Message:
        """Return an error in the place of the reply."""
        error = Error(ErrorCode.MESSAGE_UNAVAILABLE, f"it cannot be put together: {reason:.300}")
        metadata = Metadata(
            run_id=self.run_id, message_id="", src_node_id=1, dst_node_id=1, group_id="", ttl=0,
            reply_to_message_id=self.reply_to, created_at=0.0, message_type=SYSTEM_MESSAGE_TYPE,
        )  # fmt: skip
        return make_message(metadata, error=error)


class Replies:
    """Stands in the place of `HttpGrid.pull_messages`."""

    def __init__(self, most_bytes: MostBytes, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes, self._clock = most_bytes, clock
        self._announced: dict[str, Announced] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def pull(self, grid: Any, message_ids: Collection[str]) -> list[Message]:
        """Return the replies to these messages that are whole, or cannot be; the rest comes later.

        What answers none of them is passed over. Raises httpx.HTTPError where the SuperLink is
        gone, or cannot say who has replied.
        """
        client, run_id = grid._runtime_client, grid._run.run_id
        asked = [name for name in message_ids if name not in self._announced]
        if asked:  # of the others it is known, and Flower would say that they are gone
            self._note(grid, client.PullMessages(PullAppMessagesRequest(message_ids=asked)))
        pull, found = make_pull_object_fn_protobuf(client.PullObject, grid.node, run_id), []
        for one in [one for one in self._announced.values() if one.reply_to in message_ids]:
            try:
                if not one.fetch(pull, self._pool, self._clock()):
                    continue
                reply = one.put_together()
            except (OSError, httpx.TransportError):
                raise
            except Exception as error:  # a peer made the pieces up: whatever they make Flower raise
                if _stumbled(error):
                    continue  # it is asked again with the next pull
                reply = one.refused(f"{type(error).__name__}: {error}")
            del self._announced[one.reply_to]
            found.append(reply)
            self._confirm(grid, one.message_id)  # also of what was refused: its pieces go
        for reply_to in [r for r in self._announced if self._most_bytes(r) is None]:
            self._confirm(grid, self._announced.pop(reply_to).message_id)
        return found

    def _confirm(self, grid: Any, message_id: str) -> None:
        """Let the SuperLink forget a reply's pieces; where it cannot now, they go with the run."""
        with contextlib.suppress(Exception):
            grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=grid.node, run_id=grid._run.run_id, message_object_id=message_id
                )
            )

    def _note(self, grid: Any, response: Any) -> None:
        """Note what was announced, the first reply to each message."""
        trees: list[ObjectTree] = list(response.message_object_trees)
        for proto, tree in zip(response.messages_list, trees, strict=True):
            reply_to, message_id = proto.metadata.reply_to_message_id, proto.metadata.message_id
            most, known = self._most_bytes(reply_to), self._announced.get(reply_to)
            if most is None or (known and known.message_id != message_id):
                self._confirm(grid, message_id)  # nobody has asked for it: its pieces go
            elif known is None:
                wanted = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
                self._announced[reply_to] = Announced(
                    reply_to, message_id, grid._run.run_id, most, wanted, self._clock()
                )


def _pulled(pull: Pull, name: str) -> bytes | None:
    """Return a piece; None where it is not there yet."""
    try:
        return pull(name)
    except ObjectUnavailableError:
        return None


def bound_replies(most_bytes: MostBytes) -> None:
    """Let Flower's grid pull replies in this process as `Replies` does.

    Flower has no setting for it: the grid's method is replaced. Nothing is done in a process
    without such a grid.
    """
    if (module := sys.modules.get(GRID)) is not None:
        replies = Replies(most_bytes)
        module.HttpGrid.pull_messages = lambda grid, message_ids: replies.pull(
            grid, list(message_ids)
        )


def require_size(contents: Mapping[str, bytes], most_bytes: int) -> None:
    """Raise WireError where pieces, put together, would have more than `most_bytes`."""
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        most = LARGEST.get(kind, LARGEST_HEAD)
        if kind != ArrayChunk.__name__ and len(content) > most:
            raise WireError(f"its {kind:.20} has {len(content):,} bytes; {most:,} are enough.")
        if kind != Array.__name__:
            continue
        places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        total += sum(len(contents[children[place]]) for place in places)
        if total > most_bytes:
            raise WireError(
                f"put together it has more than the {most_bytes:,} bytes that it may have."
            )


_UP_TO = re.compile(r"up to (\d{1,12}) bytes\Z", re.ASCII)


def most_bytes_of(group_id: str) -> int:
    """Return how many bytes of arrays the reply to a message of a `Pending.group_id` may bring.

    >>> most_bytes_of("3, reply up to 2000 bytes"), most_bytes_of("another's") == LARGEST_REPLY
    (2000, True)
    """
    found = _UP_TO.search(group_id)
    return min(int(found[1]), LARGEST_REPLY) if found else LARGEST_REPLY
