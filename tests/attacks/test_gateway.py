"""Strangers at the gateway: docker/nginx.conf in a real nginx, and raw bytes on TLS sockets.

Behind it listens a server that notes every byte that comes through, in place of the SuperLink.
"""

import itertools
import re
import resource
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial

import pytest
from flwr.superlink.routers.fleet.router import router

from tests.deployment.test_gateway import CLOSED, MISSING, answer, gateway
from tests.support.deployment import REPOSITORY, Deployment, wait_until
from tests.support.gateway_ends import Behind, Place, connect, say

pytestmark = pytest.mark.skipif(MISSING, reason="nginx or its stream module is not installed here")

FLEET = {route.path for route in router.routes}  # type: ignore[attr-defined]  # all have one
CONFIG = (REPOSITORY / "docker" / "nginx.conf").read_text()
SLOW_CONNECTIONS = 2000
STRANGER = "Host: federation\r\nContent-Type: application/protobuf\r\nConnection: close\r\n"
HEAD = f"{STRANGER}Flwr-Public-Key: a\r\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The gateway, its port, and who listens behind it."""
    with Deployment(tmp_path_factory.mktemp("gateway"), ["site-a"]) as deployment:
        behind = Behind(deployment)
        with gateway(deployment) as port:
            yield deployment, port, behind
        behind.close()


def test_exactly_flowers_fleet_procedures_pass(place: Place) -> None:
    listed = re.search(r"/v1/fleet/\(([a-z|-]+)\)", CONFIG)
    assert listed is not None
    passing = [*listed[1].split("|"), "push-messages", "push-object", "pull-object"]
    assert {f"/v1/fleet/{name}" for name in passing} == FLEET
    for path in sorted(FLEET):
        codes, passed = say(place, f"POST {path}?x=1 HTTP/1.1\r\n{HEAD}Content-Length: 0\r\n\r\n")
        assert (codes, passed) == ([200], [f"POST {path} HTTP/1.1"])  # without what was asked


def test_nobody_says_where_it_comes_from(place: Place) -> None:
    """The SuperLink would write that down as the address of whoever asked."""
    deployment, port, behind = place
    forged = "X-Forwarded-For: 10.9.9.9\x9b31mFORGED\r\nX-Forwarded-Proto: FORGED\r\n"
    asked = f"POST /v1/fleet/get-run HTTP/1.1\r\n{HEAD}{forged}Content-Length: 0\r\n\r\n"
    behind.lines()
    with connect(deployment, port) as stream:
        stream.sendall(asked.encode("latin-1"))
        assert stream.recv(65536).startswith(b"HTTP/1.1 200")
    assert b"get-run" in behind.received
    assert b"FORGED" not in behind.received


def test_its_log_has_nothing_that_a_terminal_obeys(place: Place) -> None:
    deployment, _, _ = place
    escapes = "Referer: \x1b]0;OWNED\x07\x1b[2J\x9b31m\r\nUser-Agent: \x1b[1;1H\r\n"
    for request in ("GET /v1/fleet/get-run?\x9b31m", "POST /v1/fleet/get-run", "POST /nothing"):
        say(place, f"{request} HTTP/1.1\r\n{HEAD}{escapes}Content-Length: 99999\r\n\r\n")
    log = (deployment.folder / "nginx.log").read_bytes()
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x80-\x9f]|OWNED", log)


ESCAPED = "%20HTTP/1.1%0d%0aHost:x%0d%0a%0d%0aPOST%20/v1/control/list-runs"
PATHS = [
    *CLOSED,
    f"/v1/fleet/get-run{ESCAPED}",
    f"/v1/fleet/{ESCAPED}",
    f"/health{ESCAPED}",
    "/v1/fleet/get-run%0d%0a",
    "/v1/fleet/get-run%00/../../control/list-runs",
    "/v1/fleet/get-run%2500",
    "https://superlink/v1/control/list-runs",
    "http://superlink:8000/v1/control/list-runs",
    "*",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_other_path_passes(place: Place, path: str) -> None:
    codes, passed = say(place, f"POST {path} HTTP/1.1\r\n{HEAD}Content-Length: 0\r\n\r\n")
    assert codes[:1] in ([400], [403], [404])
    assert passed == []


INNER = f"POST /v1/control/list-runs HTTP/1.1\r\n{HEAD}Content-Length: 0\r\n\r\n"
SMUGGLED = {
    "two lengths": f"Content-Length: 0\r\nContent-Length: {len(INNER)}\r\n\r\n{INNER}",
    "length and chunks": f"Content-Length: {len(INNER) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n"
    f"0\r\n\r\n{INNER}",
    "chunks spelled oddly": "Transfer-Encoding: xchunked\r\nTransfer-Encoding: chunked\r\n\r\n"
    f"0\r\n\r\n{INNER}",
    "chunks after a tab": "Transfer-Encoding:\tchunked\r\nContent-Length: 4\r\n\r\n"
    f"0\r\n\r\n{INNER}",
    "a space before the colon": f"Content-Length : {len(INNER)}\r\n\r\n{INNER}",
    "a folded header": f"X: y\r\n Content-Length: 0\r\n\r\n{INNER}",
    "a bare line feed": f"X: y\nContent-Length: 0\n\n{INNER}",
    "a second request behind it": f"Content-Length: 0\r\n\r\n{INNER}",
}


@pytest.mark.parametrize("how", SMUGGLED)
def test_no_request_hides_in_another(place: Place, how: str) -> None:
    """What hides is refused, or is answered by the gateway itself as a request of its own."""
    kept = HEAD.replace("close", "keep-alive")
    _, passed = say(place, f"POST /v1/fleet/get-run HTTP/1.1\r\n{kept}{SMUGGLED[how]}")
    assert passed in ([], ["POST /v1/fleet/get-run HTTP/1.1"])


def test_the_body_of_a_request_stays_its_body(place: Place) -> None:
    deployment, port, behind = place
    behind.lines()
    body = f"Content-Length: {len(INNER)}\r\n\r\n{INNER}"
    say(place, f"POST /v1/fleet/get-run HTTP/1.1\r\n{HEAD}{body}")
    with connect(deployment, port) as stream:
        assert stream.selected_alpn_protocol() in (None, "http/1.1")  # HTTP/2 is not offered


@pytest.mark.parametrize("verb", ["GET", "PUT", "DELETE", "CONNECT", "TRACE", "OPTIONS"])
def test_no_other_verb_passes(place: Place, verb: str) -> None:
    codes, passed = say(place, f"{verb} /v1/fleet/get-run HTTP/1.1\r\n{HEAD}\r\n")
    assert codes[:1] in ([400], [403], [405])
    assert passed == []


KEYS = (f"Flwr-Public-Key: {number}\r\n" for number in itertools.count())


def push(place: Place, source: str, body: bytes, key: str | None = None) -> ssl.SSLSocket:
    """Begin to push a piece of 5 MB, of which a part comes, with a key that nobody else has."""
    deployment, port, _ = place
    stream = connect(deployment, port, source=source)
    who = STRANGER + (next(KEYS) if key is None else key)
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\n{who}Content-Length: {5 * 2**20}\r\n\r\n"
    stream.sendall(head.encode() + body)
    return stream


def status(stream: ssl.SSLSocket) -> str:
    """Return the status line, "" while there is none."""
    stream.settimeout(0.05)
    with suppress(OSError):
        return stream.recv(12).decode()
    return ""


def test_pieces_that_are_half_sent_fill_no_disk(place: Place) -> None:
    """So many from one address, and so many in all; others still push."""
    most = int(re.search(r"limit_conn pieces (\d+)", CONFIG)[1])  # type: ignore[index]
    everybody = int(re.search(r"limit_conn bodies (\d+)", CONFIG)[1])  # type: ignore[index]
    assert everybody * 6 < 1024, "MB, of the gateway's /tmp"
    half = b"\n" * 2**17
    with ExitStack() as stack:
        slow = [stack.enter_context(push(place, "127.0.0.4", half)) for _ in range(most + 16)]
        assert [status(stream) for stream in slow].count("HTTP/1.1 503") == 16
        with push(place, "127.0.0.5", b"\n" * 5 * 2**20) as quick:
            quick.settimeout(10)
            assert quick.recv(12).decode() == "HTTP/1.1 200"
        sources = [f"127.0.3.{i}" for i in range(everybody // most) for _ in range(most)]
        more = [stack.enter_context(push(place, source, half)) for source in sources]
        refused = [status(stream) for stream in more].count("HTTP/1.1 503")
        assert most + len(more) - refused == everybody


def test_who_has_no_key_holds_no_place(place: Place) -> None:
    """Who it is comes before the body: two addresses would have held all places for pieces."""
    deployment, port, behind = place
    behind.lines()
    with ExitStack() as stack:
        sources = [f"127.0.0.{40 + i % 2}" for i in range(48)]
        slow = [stack.enter_context(push(place, one, b"\n", key="")) for one in sources]
        for path in ("pull-object", "pull-messages"):
            for i in range(64):
                half = connect(deployment, port, source=f"127.0.0.{50 + i % 4}")
                slow.append(stack.enter_context(half))
                head = f"{STRANGER}Content-Length: 99\r\n\r\n"
                half.sendall(f"POST /v1/fleet/{path} HTTP/1.1\r\n{head}".encode())
        time.sleep(2)
        with push(place, "127.0.0.44", b"\n" * 5 * 2**20) as quick:
            quick.settimeout(10)
            assert quick.recv(12).decode() == "HTTP/1.1 200"
        for path in ("pull-object", "pull-messages"):
            asked = f"POST /v1/fleet/{path} HTTP/1.1\r\n{HEAD}Content-Length: 0\r\n\r\n"
            assert say(place, asked)[0] == [200]
        for stream in slow:
            stream.settimeout(5)
            with suppress(ConnectionResetError):
                assert stream.recv(12) in (b"", b"HTTP/1.1 401", b"HTTP/1.1 503")


@pytest.mark.parametrize("begun", ["Content-Length: 4000", "Transfer-Encoding: chunked"])
def test_nor_by_asking_whether_the_server_is_well(place: Place, begun: str) -> None:
    """The one question that needs no key: with a body on its way it would hold a place for good."""
    deployment, port, _ = place
    with ExitStack() as stack:
        for _ in range(40):
            half = stack.enter_context(connect(deployment, port))  # the participant's own address
            half.sendall(f"GET /health HTTP/1.1\r\n{STRANGER}{begun}\r\n\r\n".encode())
        time.sleep(1)
        asked = f"POST /v1/fleet/pull-messages HTTP/1.1\r\n{HEAD}Content-Length: 0\r\n\r\n"
        assert say(place, asked)[0] == [200]
        assert say(place, f"GET /health HTTP/1.1\r\n{STRANGER}\r\n")[0] == [200]


@pytest.mark.parametrize("procedure", ["push-object", "pull-object", "pull-messages"])
def test_one_key_is_one_participant_from_wherever_it_asks(place: Place, procedure: str) -> None:
    """Few of its requests are on their way at once, so that others have their turn."""
    deployment, port, _ = place
    zone = {"push-object": "key_pushes", "pull-object": "key_fetches"}.get(procedure, "key_asks")
    most = int(re.search(rf"limit_conn {zone} (\d+)", CONFIG)[1])  # type: ignore[index]
    key = f"{procedure:x>288}"  # as long as one on P-384 is
    asked = f"POST /v1/fleet/{procedure} HTTP/1.1\r\n{STRANGER}Flwr-Public-Key: {key}\r\n"
    with ExitStack() as stack:
        sent = []
        for i in range(3 * most):
            sent.append(connect(deployment, port, source=f"127.0.0.{60 + i}"))
            stack.enter_context(sent[-1])
            sent[-1].sendall(f"{asked}Content-Length: 99\r\n\r\n".encode())
        time.sleep(1)
        assert (
            sorted(status(stream) for stream in sent) == [""] * most + ["HTTP/1.1 503"] * 2 * most
        )


def test_what_is_read_slowly_waits_at_the_gateway(place: Place) -> None:
    """A SuperLink that kept it would keep some 12 MB for each."""
    deployment, port, behind = place
    most = int(re.search(r"limit_conn answers (\d+)", CONFIG)[1])  # type: ignore[index]
    bodies = int(re.search(r"limit_conn bodies (\d+)", CONFIG)[1])  # type: ignore[index]
    assert (most + bodies) * 6 < 1024, "MB, of the gateway's /tmp"
    behind.size, behind.answered = 5 * 2**20, 0
    with ExitStack() as stack:
        stack.callback(setattr, behind, "size", 0)
        for _ in range(8):
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.connect(("127.0.0.1", port))
            trusted = ssl.create_default_context(cafile=str(deployment.certs / "site-a" / "ca.crt"))
            stream = stack.enter_context(trusted.wrap_socket(plain, server_hostname="127.0.0.1"))
            head = f"{STRANGER}{next(KEYS)}Content-Length: 0\r\n\r\n"
            stream.sendall(f"POST /v1/fleet/pull-object HTTP/1.1\r\n{head}".encode())
        wait_until(lambda: behind.answered == 8, 10, "all of it has left the SuperLink")


def test_only_pieces_are_large(place: Place) -> None:
    large = {"pull-messages": 2**13, "register-node": 2**13}
    for procedure, size in {"push-messages": 2**20, **large, "push-object": 7 * 2**20}.items():
        head = f"{HEAD}Content-Length: {size}\r\n\r\n"
        assert say(place, f"POST /v1/fleet/{procedure} HTTP/1.1\r\n{head}") == ([413], [])


def test_headers_that_stop_are_let_go(place: Place) -> None:
    deployment, port, _ = place
    held = partial(connect, deployment, port, source="127.0.0.6")
    with held() as one, held() as other:
        one.sendall(b"POST /v1/fl")
        other.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: ")
        for stream in (one, other):
            stream.settimeout(15)
            assert stream.recv(12) in (b"", b"HTTP/1.1 408")


def test_thousands_of_slow_connections_leave_others_alone(place: Place) -> None:
    """Two thousand half-sent headers, from another address and from a hundred others."""
    deployment, port, _ = place
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(SLOW_CONNECTIONS):
            source = "127.0.0.2" if number % 2 else f"127.0.1.{number // 20}"
            with suppress(OSError):  # beyond what one address may hold
                slow = socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))
                stack.callback(slow.close)
                slow.sendall(b"\x16\x03\x01")  # begins a TLS handshake, and says no more
        for _ in range(20):
            assert answer(deployment, port, "/health", "GET") == 200


def test_one_address_cannot_hold_every_connection(place: Place) -> None:
    deployment, port, _ = place
    limit = int(re.search(r"limit_conn connections (\d+)", CONFIG)[1])  # type: ignore[index]
    with ExitStack() as stack:
        held = 0
        for _ in range(limit + 100):
            with suppress(OSError):
                stack.enter_context(connect(deployment, port, source="127.0.0.3"))
                held += 1
        assert limit - 5 <= held <= limit
        assert answer(deployment, port, "/health", "GET") == 200
