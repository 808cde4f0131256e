"""The warm worker: one local process per participant that keeps torch, data and model loaded.

Flower starts a process for every message. That process imports no torch: it forwards the message
over a local socket to the worker (`link`), which is started on demand and ends when idle
(`process`). Anything that keeps the worker from replying ends with the message being handled in the
process itself, as if there were no worker.

On the socket go only bytes (`send_bytes`, `recv_bytes`), after both ends have proved that they know
a key from a file of this user's alone: the request's facts as JSON and its body; back come
`WORKING` every second, then JSON (empty, or what went wrong), then the reply's body.
"""

from contextlib import suppress
from pathlib import Path

WORKING = b"working"
RECORD = "worker.json"
MAX_LOG_BYTES = 1 << 20


def remove_socket(address: str) -> None:
    """Remove what a process that did not end by itself leaves: a socket in a folder of its own."""
    with suppress(OSError):
        Path(address).unlink(missing_ok=True)
        Path(address).parent.rmdir()
