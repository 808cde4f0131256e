"""A participant's models of every federation, safe from the next round, run and crash.

    models/<federation>/round-00000012/personal_model.*, history.jsonl

A version is written beside the others and renamed when it is whole. The newest stays (last), and
the one that was best on the validation examples; both outlive the federation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DataError
from common.files import PRIVATE, closed_folder, read_rows
from common.log import logger

if TYPE_CHECKING:
    from client_app.personal import PersonalModel

MODELS, DESCRIPTION, HISTORY = "models", "personal_model.json", "history.jsonl"
MOST_FEDERATIONS = 20
"""Whose models are kept, the newest: a server names its federation."""
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
        """Add a version, and drop those that are neither last nor best."""
        home = self.state / MODELS / _name_of(federation)
        closed_folder(home)
        draft, place = home / ".draft", home / f"round-{server_round:08d}"
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        model.store(draft, program=program)
        self._note(home / HISTORY, model.describe(), server_round)
        shutil.rmtree(place, ignore_errors=True)  # of a round that is being repeated
        draft.rename(place)
        versions = self.versions(home.name)
        later = [v for v in versions if v.server_round > server_round]  # being repeated as well
        kept = [v for v in versions if v not in later]
        wanted = {kept[-1].folder, max(kept, key=lambda v: v.quality).folder}
        for version in versions:
            if version.folder not in wanted:
                shutil.rmtree(version.folder, ignore_errors=True)
        self._prune()

    def versions(self, federation: str) -> list[Version]:
        """Return the whole versions of a federation, by round; what is damaged is passed over."""
        found = []
        home = self.state / MODELS / federation
        for folder in sorted(home.iterdir()) if home.is_dir() else ():
            match = _VERSION.fullmatch(folder.name)
            try:
                about = json.loads((folder / DESCRIPTION).read_text())
            except (OSError, ValueError):
                continue
            if match and isinstance(about, dict):
                found.append(Version(folder, federation, int(match[1]), about))
        return found

    def history(self, federation: str) -> list[dict[str, Any]]:
        """Return what every model that came reached, a row each, in the order of their coming."""
        return read_rows(self.state / MODELS / federation / HISTORY)

    def _note(self, path: Path, about: dict[str, Any], server_round: int) -> None:
        wanted = ("validation_accuracy", "test_accuracy", "num_test", "gain", "epsilon")
        row = {"round": server_round, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        row |= {k: v for k, v in about.items() if k in wanted or k.startswith("accuracy_")}
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
        for name in self.federations()[:-MOST_FEDERATIONS]:
            logger.info("Models of federation %s are dropped: %d are newer", name, MOST_FEDERATIONS)
            shutil.rmtree(self.state / MODELS / name, ignore_errors=True)


def _name_of(federation: str) -> str:
    """Return a folder's name for a federation, whose id a server makes up."""
    return re.sub(r"[^A-Za-z0-9]", "", federation)[:32] or "unnamed"
