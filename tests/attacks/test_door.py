"""At a SuperLink's door: who it is comes before a large body, and a busy database is said so."""

import asyncio
from base64 import b64decode, b64encode
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, HTTPException, Request
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from experiments.deploy.guard import BusyError, NotStoredError
from experiments.deploy.superlink import KNOWN, WITH_BODY, at_the_door

MINE, THEIRS = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))


class Door:
    """An app behind the door that reads bodies whole and raises what it is told to."""

    def __init__(self) -> None:
        self.read, self.error = 0, None
        dispatch = partial(at_the_door, translated=http_error_translator)
        app = FastAPI(middleware=[Middleware(BaseHTTPMiddleware, dispatch=dispatch)])

        @app.post("/{path:path}")
        async def answer(request: Request) -> dict[str, str]:
            self.read += len(await request.body())
            if self.error:
                raise self.error
            return {}

        self.app = app

    def post(self, path: str, **headers: str) -> int:
        return asyncio.run(self._post(path, headers))

    async def _post(self, path: str, headers: dict[str, str]) -> int:
        link = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=link, base_url="http://door") as client:
            response = await client.post(path, content=b"x" * 1000, headers=headers)
        return response.status_code


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    keys = {public_key_to_bytes(MINE.public_key()): 7}
    link = SimpleNamespace(get_node_id_by_public_key=keys.get)
    monkeypatch.setattr("flwr.superlink.dependencies.linkstate.get_linkstate", lambda _: link)
    return Door()


def signed(key: Any, *, by: Any = None) -> dict[str, str]:
    time = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: time,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(by or key, time.encode())).decode(),
    }


@pytest.mark.parametrize("path", WITH_BODY)
def test_a_strangers_body_is_not_read(door: Door, path: str) -> None:
    junk = dict.fromkeys(signed(MINE), "?")
    for headers in ({}, junk, signed(THEIRS), signed(MINE, by=THEIRS)):
        assert door.post(path, **headers) == 401
    assert door.read == 0
    assert door.post(path, **signed(MINE)) == 200
    assert door.read == 1000


def test_the_gateway_is_told_who_is_known(door: Door) -> None:
    """By one spelling of each key: it counts what is on its way by what stands there."""
    mine = signed(MINE)
    assert door.post(KNOWN, **mine) == 204
    assert door.post(KNOWN, **signed(THEIRS)) == 401
    spelt = mine[FLEET_HTTP_PUBLIC_KEY_HEADER]
    assert spelt.endswith("="), "bits are left over, which mean nothing"
    other = spelt[:-2] + chr(ord(spelt[-2]) + 1) + "="
    assert b64decode(other, validate=True) == b64decode(spelt)
    assert door.post(KNOWN, **{**mine, FLEET_HTTP_PUBLIC_KEY_HEADER: other}) == 401
    assert door.read == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OperationalError("insert", {}, Exception("database is locked")), 503),
        (BusyError("many are waiting"), 503),
        (NotStoredError("a piece was not stored"), 503),
        (IntegrityError("insert", {}, Exception("twice")), 500),
        (HTTPException(418), 418),
    ],
)
def test_who_meets_a_busy_database_is_to_come_again(
    door: Door, error: Exception, status: int
) -> None:
    """Flower's callers give up at 500: their heartbeats end, and with them the run."""
    door.error = error
    assert door.post("/v1/fleet/send-node-heartbeat") == status
