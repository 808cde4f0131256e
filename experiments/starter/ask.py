"""`flwr-clientapp` as a participant's SuperNode finds it: ask the starter to fork, or do it.

`python -I -S ask.py FOLDER PROGRAM WORDS`: nothing but the standard library, because it runs once
for every message. It ends as soon as the message's process runs; Flower does not wait for it.
"""

import json
import os
import socket
import struct
import sys

PATIENCE_S = 60.0
"""For a starter that is still importing Flower on a busy machine."""


def ask(folder: str, program: str, words: list[str]) -> bool:
    """Return whether the starter in `folder` runs the message now."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    body = json.dumps(request).encode()
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(f"/proc/self/fd/{place}/{program}.sock")
        socket.send_fds(connection, [struct.pack("!I", len(body))], [0, 1, 2])
        connection.sendall(body)
        return connection.recv(1) == b"1"


def main() -> None:
    """Hand the message over; without a starter become its process."""
    folder, program, *words = sys.argv[1:]
    try:
        if ask(folder, program, words):
            return
    except OSError:
        pass
    alone = os.path.join(os.path.dirname(os.path.abspath(__file__)), "message.py")
    os.execv(sys.executable, [sys.executable, "-P", alone, program, *words])


if __name__ == "__main__":
    main()
