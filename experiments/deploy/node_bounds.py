"""What others may cost a participant's SuperNode: its server's answers, its machine's other users.

Flower reads the body of a request before it asks who it is from, holds connections that ask
nothing, reads and unpacks an answer whatever its size, and goes where an answer sends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode import main
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_ANSWER = 1 << 20
"""Bytes of an answer; as Python's objects they are up to a hundred times as many."""
MOST_CONTENT = 1 << 27
"""Bytes of one that brings an app or a piece; arrays come in pieces of 5 MiB."""
WITH_CONTENT = ("/get-fab", "/pull-object")
MOST_ASKED = 1 << 16
"""Bytes of a request that is of no task: the SuperExec's, which asks for one."""
MOST_CONNECTIONS, PATIENCE_S = 1024, 10.0
"""Connections to the API at a time, and seconds in which one has asked something."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


def install() -> None:
    """Put these bounds around Flower's SuperNode, in this process."""
    ProtobufClient.__init__ = hardened(ProtobufClient.__init__)  # type: ignore[method-assign]
    vars(main)["create_app"] = partial(_behind_door, main.create_app)
    config = partial(uvicorn.Config, http=Hurried, ws="none")
    shim = SimpleNamespace(Server=uvicorn.Server, Config=config)
    vars(import_module("flwr.supernode.cli.flower_supernode"))["uvicorn"] = shim


def hardened(flower: Callable[..., None]) -> Callable[..., None]:
    """Return how a client of Flower's is made, one that takes bounded answers from one place."""

    def init(self: Any, *args: Any, **options: Any) -> None:
        flower(self, *args, **options)
        self._client.follow_redirects = False
        self._client.headers["accept-encoding"] = "identity"
        self._client.event_hooks = {"response": [bounded]}

    return init


def bounded(response: httpx.Response) -> None:
    """Count the bytes of an answer as they come; raise httpx.DecodingError where it is packed."""
    if (packed := response.headers.get("content-encoding", "identity")) != "identity":
        raise httpx.DecodingError(f"the server packed its answer ({packed:.20}), unasked")
    has_content = response.request.url.path.endswith(WITH_CONTENT)
    response.stream = Counted(response.stream, MOST_CONTENT if has_content else MOST_ANSWER)


class Counted(httpx.SyncByteStream):
    """An answer of at most so many bytes."""

    def __init__(self, stream: Any, most: int) -> None:
        self._stream, self._most = stream, most

    def __iter__(self) -> Iterator[bytes]:
        """Yield the parts of the answer; raise httpx.DecodingError beyond the bound."""
        count = 0
        for part in self._stream:
            count += len(part)
            if count > self._most:
                raise httpx.DecodingError(f"the server's answer has more than {self._most:,} bytes")
            yield part

    def close(self) -> None:
        """Close the answer."""
        self._stream.close()


def _behind_door(flower: Callable[..., Any], *args: Any, **options: Any) -> Door:
    return Door(flower(*args, **options))


class Door:
    """Stands before the API: what is of no task it knows is small, and comes at once."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Any) -> None:
        """Let a request in, or say 413."""
        if scope["type"] != "http" or await run_in_threadpool(self._is_of_task, scope):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                body = await small_body(receive)
        except TimeoutError:
            body = None
        if body is None:
            await Response(status_code=413, headers={"connection": "close"})(scope, receive, send)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, again, send)

    def _is_of_task(self, scope: Message) -> bool:
        name = TASK_TOKEN_HEADER.lower().encode()
        tokens = [value.decode("latin-1") for key, value in scope["headers"] if key == name]
        state = self._app.state.runtime_state_factory.state()
        return len(tokens) == 1 and state.get_task_by_token(tokens[0]) is not None


async def small_body(receive: Receive) -> bytes | None:
    """Read a body; return None of one of more than `MOST_ASKED` bytes, or that ends before."""
    body = b""
    while len(body) <= MOST_ASKED:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body if len(body) <= MOST_ASKED else None
    return None


class Hurried(H11Protocol):
    """A connection that is for those who ask something."""

    def connection_made(self, transport: Any) -> None:
        """Begin; of too many, one that has asked nothing goes."""
        super().connection_made(transport)
        self.loop.call_later(PATIENCE_S, self._require_request)
        if len(self.connections) > MOST_CONNECTIONS:
            found: Any = self.connections
            others = (x for x in found if x is not self and x.cycle is None)
            next(others, self).transport.abort()

    def _require_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()
