"""What a server says beside its rounds: that it refuses a participant, or that its run pauses.

It is written down in the participant's state folder, where `join` and `status` read it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client_app.store import MARKER, ClientState, FolderState
from common.files import PRIVATE, printable, read_json, replace_file
from common.log import logger
from common.messages import FINAL, FINISH, PAUSED, REASON, REFUSED, REGISTER
from common.records import Received

REFUSAL, PAUSE, MOST_WORDS = "refusal.json", "pause.json", 1000


def take_notice(state: ClientState, message_type: str, task: Received) -> bool:
    """Note what a query says; return whether that is all: it wants nothing but an empty reply.

    A run goes on when it asks a participant, to which it said that it pauses, who it is.
    """
    now, federation = task.header.server_round, task.header.federation_id
    if message_type == REFUSED:
        text = printable(task.value(REASON, str))[:MOST_WORDS]
        logger.error("refused by the server: %s", text)
        _note(state, REFUSAL, {"reason": text, "final": task.flag(FINAL)})
        return True
    facts = {"federation": federation, "round": now, "time": _now()}
    if message_type == FINISH and task.flag(PAUSED):
        logger.info("the run has paused after round %d", now)
        _note(state, PAUSE, {**facts, "continued": False, "told": True})
        return True
    if message_type == REGISTER and isinstance(state, FolderState):
        pause = read_json(state.folder / PAUSE)
        if pause.get("federation") == federation and not pause["continued"]:
            logger.info("the run goes on at round %d", now)
            _note(state, PAUSE, {**facts, "continued": True, "told": True})
    return False


def note_stop(folder: Path, server_round: int) -> None:
    """Note that a run took no reply of a round any more: it stopped, or ended, while a site worked.

    A SuperNode takes no message before it has sent its reply: the server cannot tell it.
    """
    federation, pause = read_json(folder / MARKER).get("id"), read_json(folder / PAUSE)
    is_known = pause.get("federation") == federation and not pause["continued"]
    if federation and not is_known:
        facts = {"federation": federation, "round": server_round - 1, "time": _now()}
        _note(FolderState(folder), PAUSE, {**facts, "continued": False, "told": False})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _note(state: ClientState, name: str, facts: dict[str, Any]) -> None:
    if not isinstance(state, FolderState):
        return
    try:
        replace_file(state.folder / name, json.dumps(facts), mode=PRIVATE)
    except OSError as error:  # a full disk costs this note, not the round
        logger.error("%s is not on disk: %s", state.folder / name, error)
