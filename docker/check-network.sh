#!/bin/bash
# From a participant's container: what can it reach of the server? Only the fleet API, or exit 1.
#   docker-compose exec site-a /opt/docker/check-network.sh [IP of the SuperLink]
# Which paths the gateway must not pass: closed-paths.txt, which a test reads as well.
exec python3 - "$(dirname "$0")/closed-paths.txt" "$@" <<'PY'
import socket
import ssl
import sys
import urllib.error
import urllib.request

GATEWAY = "https://federation:9443"
PROTOBUF = {"Content-Type": "application/protobuf"}
context = ssl.create_default_context(cafile="/secrets/ca.crt")
failures = 0


def expect(what: str, got: str, wanted: str) -> None:
    global failures
    good = got == wanted
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'} {what}: {got}" + ("" if good else f", expected {wanted}"))


def post(path: str) -> str:
    request = urllib.request.Request(GATEWAY + path, data=b"", headers=PROTOBUF)
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)


def connects(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), 5).close()
    except OSError:
        return "unreachable"
    return "reachable"


for path in open(sys.argv[1]).read().split():
    expect(f"POST {path}", post(path), "404")
expect("fleet API without a key", post("/v1/fleet/activate-node"), "401")
expect("superlink:8000 by name", connects("superlink", 8000), "unreachable")
for address in sys.argv[2:]:
    expect(f"{address}:8000", connects(address, 8000), "unreachable")
for other in ("site-a", "site-b", "site-c"):
    if other not in open("/etc/hosts").read() and connects(other, 9094) == "reachable":
        expect(f"{other}:9094", "reachable", "unreachable")
sys.exit(failures > 0)
PY
