"""A participant's models of every federation, safe from the next round, run and crash.

    models/<federation>/round-00000012/personal_model.*, history.jsonl

A version is written beside the others and renamed when it is whole. The newest stays (last), and
the one that was best on the validation examples; both outlive the federation.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from common.errors import DataError
from common.files import PRIVATE, closed_folder, read_rows, replace_file, sync
from common.log import logger

if TYPE_CHECKING:
    from client_app.personal import PersonalModel

MODELS, DESCRIPTION, HISTORY = "models", "personal_model.json", "history.jsonl"
LOCK, LOCK_TIMEOUT_S = ".lock", 60.0
MOST_FEDERATIONS, MANY = 20, 1000
"""Whose models are kept: a server names its federation. And rows of a history that is cut."""
MOST_HISTORY = 2**22
"""Bytes of a history, from which on it is cut."""
LAST, BEST = "last", "best"

_VERSION = re.compile(r"round-(\d{8})")


@dataclass(frozen=True)
class Version:
    """One stored model: where it is, the federation's name, its round, its description."""

    folder: Path
    federation: str
    server_round: int
    about: dict[str, Any]

    @property
    def quality(self) -> tuple[float, int]:
        """What the best has most of: accuracy on validation examples, then rounds."""
        found = self.about.get("validation_accuracy")
        return (-1.0 if found is None else float(found), self.server_round)


@dataclass(frozen=True)
class Shelf:
    """The models below one participant's state folder."""

    state: Path

    def keep(
        self, model: PersonalModel, federation: str, server_round: int, *, program: bool
    ) -> None:
        """Add a version, and drop those that are neither the newest nor the best."""
        home = self.state / MODELS / _name_of(federation)
        closed_folder(home)
        with FileLock(home / LOCK, mode=PRIVATE, timeout=LOCK_TIMEOUT_S):
            place, draft = home / f"round-{server_round:08d}", home / ".draft"
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
            model.store(draft, program=program)
            if place.exists():  # of a round that is being repeated
                place.rename(home / f".old-{secrets.token_hex(4)}")
            draft.rename(place)
            sync(home)
            self._note(home / HISTORY, model.describe(), server_round)
            versions = self.versions(home.name)
            wanted = {place, max(versions, key=lambda v: v.quality).folder}
            for folder in home.iterdir():
                if folder.is_dir() and folder not in wanted:
                    shutil.rmtree(folder, ignore_errors=True)
        self._prune()

    def versions(self, federation: str) -> list[Version]:
        """Return the whole versions of a federation, the newest last; damaged ones are not."""
        found = []
        home = self.state / MODELS / federation
        for folder in home.iterdir() if home.is_dir() else ():
            match, description = _VERSION.fullmatch(folder.name), folder / DESCRIPTION
            try:
                about, written = json.loads(description.read_text()), description.stat().st_mtime_ns
            except (OSError, ValueError):
                continue
            if match and isinstance(about, dict):
                found.append((written, Version(folder, federation, int(match[1]), about)))
        return [version for _, version in sorted(found, key=lambda pair: pair[0])]

    def history(self, federation: str) -> list[dict[str, Any]]:
        """Return what every model that came reached, a row each, in the order of their coming."""
        return read_rows(self.state / MODELS / federation / HISTORY)

    def _note(self, path: Path, about: dict[str, Any], server_round: int) -> None:
        wanted = ("validation_accuracy", "test_accuracy", "num_test", "gain", "epsilon")
        row = {"round": server_round, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        row |= {k: v for k, v in about.items() if k in wanted or k.startswith("accuracy_")}
        if path.exists() and path.stat().st_size > MOST_HISTORY:
            kept = path.read_text().splitlines(keepends=True)[-MANY:]
            replace_file(path, "".join(kept), mode=PRIVATE)
        with open(path, "a", opener=lambda name, flags: os.open(name, flags, PRIVATE)) as file:
            file.write(json.dumps(row) + "\n")

    def federations(self) -> list[str]:
        """Return the names of the federations whose models are here, the newest last."""
        home = self.state / MODELS
        folders = [p for p in home.iterdir() if p.is_dir()] if home.is_dir() else []
        return [p.name for p in sorted(folders, key=lambda p: (p.stat().st_mtime_ns, p.name))]

    def find(self, which: str, federation: str = "") -> Version:
        """Return the last or the best model of a federation, by default of the newest.

        Raises DataError where there is none.
        """
        known = self.federations()
        name = federation or (known[-1] if known else "")
        versions = self.versions(name) if name else []
        if not versions:
            here = f"; here are those of {', '.join(known)}" if known else ""
            raise DataError(
                f"{self.state} holds no model{f' of federation {name}' if name else ''}{here}. A "
                "participant has one after the first round that it takes part in."
            )
        return versions[-1] if which == LAST else max(versions, key=lambda v: v.quality)

    def _prune(self) -> None:
        """Drop federations beyond `MOST_FEDERATIONS`: first those of whom least has come."""
        known = self.federations()
        fewest_first = sorted(known[:-1], key=lambda name: min(len(self.history(name)), MANY))
        for name in fewest_first[: max(0, len(known) - MOST_FEDERATIONS)]:
            logger.info("Models of federation %s are dropped: %d others are kept", name, len(known))
            shutil.rmtree(self.state / MODELS / name, ignore_errors=True)


def _name_of(federation: str) -> str:
    """Return a folder's name for a federation, whose id a server makes up."""
    if re.fullmatch(r"[0-9a-f]{1,32}", federation):
        return federation
    return "x" + hashlib.sha256(federation.encode()).hexdigest()[:31]
