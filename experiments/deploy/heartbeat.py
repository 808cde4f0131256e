"""The heartbeat of a participant's SuperNode: while it beats, its server sends it messages.

Flower's ends for good at the first answer it does not expect, and the SuperNode, which goes on
asking for messages, gets none any more.
"""

from __future__ import annotations

import os
import signal

import httpx
from flwr.supercore.heartbeat import HeartbeatFailure, HeartbeatSender
from flwr.supernode import fleet_http_connection

from common.files import printable
from common.log import logger


def install() -> None:
    """Put this heartbeat in the place of Flower's, in this process."""
    vars(fleet_http_connection)["HeartbeatSender"] = Heartbeat


class Heartbeat(HeartbeatSender):
    """Beats again where the server stumbles; whatever else it meets ends the SuperNode.

    Then `join` starts it again, and it connects anew.
    """

    def _run(self) -> None:
        try:
            super()._run()
        except Exception as error:
            logger.error("no heartbeat any more: %s", printable(str(error))[:1000])
            os.kill(os.getpid(), signal.SIGINT)  # Flower's own way to leave; a second one is too

    def _heartbeat(self) -> None:
        try:
            super()._heartbeat()
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                raise HeartbeatFailure from error
            raise
