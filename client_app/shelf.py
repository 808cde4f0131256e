"""A participant's models of every federation, safe from the next round, run and crash.

    models/<federation>/round-00000012-000000057/personal_model.*, history.jsonl

A version is written beside the others and renamed when it is whole; none is ever written over. The
newest stays (last), and the one that was best on the validation examples; both outlive the
federation. A server may repeat rounds, make up federations, and say how many examples validate: the
best gives way only to one that is surely as good on the same examples, and the oldest federations
stay.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from common.errors import ConfigError, DataError
from common.files import (
    PRIVATE,
    closed_folder,
    parsed,
    read_file,
    read_rows,
    replace_file,
    sync,
)
from common.log import logger

if TYPE_CHECKING:
    from client_app.personal import PersonalModel

MODELS, DESCRIPTION, HISTORY = "models", "personal_model.json", "history.jsonl"
LOCK, LOCK_TIMEOUT_S = ".lock", 60.0
MOST_FEDERATIONS, MANY = 20, 1000
"""Whose models are kept: a server names its federation. And rows of a history that is cut."""
MOST_BEST = 3
"""Sets of examples of a federation, the best model of each of which is kept."""
BEGUN = "begun"
MOST_HISTORY = 2**22
"""Bytes of a history, from which on it is cut."""
LAST, BEST = "last", "best"
Z = 2.0
"""Standard errors of the interval by which models are compared."""

_VERSION = re.compile(r"round-(\d{8})-(\d{9})")
"""Its round, and the how manieth version of the federation it is."""
MOST_NUMBERS = 50_000_000
"""Of an example: what a description says of one is made before weights are read."""


@dataclass(frozen=True)
class Version:
    """One stored model: where it is, the federation's name, its round, its description."""

    folder: Path
    federation: str
    server_round: int
    number: int
    about: dict[str, Any]

    @property
    def quality(self) -> float:
        """What accuracy on the validation examples is at least, -1 where there were none.

        The lower end of Wilson's interval at two standard errors: all of one example is less than
        most of thirty.
        """
        found, count = self.about.get("validation_accuracy"), self.about.get("num_validation", 0)
        if found is None or not count:
            return -1.0
        spread = math.sqrt(found * (1 - found) / count + Z**2 / (4 * count**2))
        return float((found + Z**2 / (2 * count) - Z * spread) / (1 + Z**2 / count))

    @property
    def examples(self) -> str:
        """Which examples it was validated on: models are compared on the same ones alone."""
        return str(self.about.get("validated_on", ""))


@dataclass(frozen=True)
class Shelf:
    """The models below one participant's state folder."""

    state: Path

    def keep(
        self, model: PersonalModel, federation: str, server_round: int, *, program: bool
    ) -> None:
        """Add a version, and drop those that are neither the newest nor the best on any examples.

        Of many sets of examples the first stays, and the last ones.
        """
        home = self.state / MODELS / _name_of(federation)
        closed_folder(home)
        with FileLock(home / LOCK, mode=PRIVATE, timeout=LOCK_TIMEOUT_S):
            if not (home / BEGUN).exists():
                replace_file(home / BEGUN, str(time.time_ns()), mode=PRIVATE)
            earlier = self.versions(home.name)
            number = 1 + max((v.number for v in earlier), default=0)
            name = f"round-{server_round:08d}-{number:09d}"
            place, draft = home / name, home / ".draft"
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
            model.store(draft, program=program, once=home)
            draft.rename(place)
            sync(home)
            best = [version.folder for version in self._best_of_each(home.name)]
            kept = {place, *best[:1], *best[1 - MOST_BEST :]}
            for folder in home.iterdir():
                if folder.is_dir() and folder not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
            for frozen in home.glob("frozen-*"):
                if frozen.stat().st_nlink == 1:
                    frozen.unlink()
            self._note(home / HISTORY, model.describe(), server_round)
        self._prune()

    def best(self, federation: str) -> Version | None:
        """Return the best version on the examples of now; None where none is whole."""
        return next(iter(self._best_of_each(federation)[::-1]), None)

    def _best_of_each(self, federation: str) -> list[Version]:
        """Return the best version on each set of examples, the set of the newest version last.

        Of two that are as good it is the newer.
        """
        found: dict[str, list[Version]] = {}
        for version in self.versions(federation):
            found[version.examples] = [*found.pop(version.examples, []), version]
        return [max(x, key=lambda v: (v.quality, v.number)) for x in found.values()]

    def require_same(self, federation: str, followed: Mapping[str, Any]) -> None:
        """Raise ConfigError where a run says other things of the examples than its federation did.

        The participant itself may name what it left to the run.
        """
        for version in self.versions(_name_of(federation))[-1:]:
            before = version.about.get("followed", {})
            for key in followed.keys() & before.keys():
                if followed[key] != before[key]:
                    raise ConfigError(
                        f"this run says {key} = {followed[key]!r}, and in round "
                        f"{version.server_round} of its federation it was {before[key]!r}: what a "
                        f"participant's models are tested on is not changed. Start a new "
                        f"federation, or the participant sets {key} in its own file."
                    )

    def versions(self, federation: str) -> list[Version]:
        """Return the whole versions of a federation, the newest last; damaged ones are not."""
        found = []
        home = self.state / MODELS / federation
        for folder in home.iterdir() if home.is_dir() else ():
            match, description = _VERSION.fullmatch(folder.name), folder / DESCRIPTION
            try:
                about = parsed(read_file(description))
            except (OSError, ValueError):
                continue
            if match and isinstance(about, dict) and _is_bounded(about):
                found.append(Version(folder, federation, int(match[1]), int(match[2]), about))
        return sorted(found, key=lambda version: version.number)

    def history(self, federation: str) -> list[dict[str, Any]]:
        """Return what every model that came reached, a row each, in the order of their coming."""
        try:
            return read_rows(self.state / MODELS / federation / HISTORY, skips_damaged=True)
        except (OSError, UnicodeError) as error:
            raise DataError(f"the history of {federation} cannot be read: {error}") from error

    def _note(self, path: Path, about: dict[str, Any], server_round: int) -> None:
        wanted = (
            "validation_accuracy",
            "test_accuracy",
            "num_test",
            "gain",
            "epsilon",
            "run_ended",
        )
        row = {"round": server_round, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        row |= {k: v for k, v in about.items() if k in wanted or k.startswith("accuracy_")}
        if path.exists() and path.stat().st_size > MOST_HISTORY:
            kept = path.read_text().splitlines(keepends=True)[-MANY:]
            replace_file(path, "".join(kept), mode=PRIVATE)
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, PRIVATE)) as file:
            torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
            file.write(b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")

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
        return versions[-1] if which == LAST else self.best(name) or versions[-1]

    def _prune(self) -> None:
        """Drop federations beyond `MOST_FEDERATIONS`: not the one of now, nor the best one.

        Of the others the first and the last to begin stay: federations that a server makes up push
        out neither those before them nor those after.
        """
        known = self.federations()
        best = max(known, key=self._quality)
        others = sorted((name for name in known[:-1] if name != best), key=self._begun)
        first = (MOST_FEDERATIONS - 2) // 2
        for name in others[first : len(others) - (MOST_FEDERATIONS - 2 - first)]:
            logger.warning(
                "Models of federation %s are dropped: %d others are kept below %s.",
                name, MOST_FEDERATIONS, self.state / MODELS,
            )  # fmt: skip
            shutil.rmtree(self.state / MODELS / name, ignore_errors=True)

    def _quality(self, federation: str) -> float:
        best = self.best(federation)
        return best.quality if best else -1.0

    def _begun(self, federation: str) -> int:
        try:
            return int((self.state / MODELS / federation / BEGUN).read_text())
        except (OSError, ValueError):
            return 0


def _name_of(federation: str) -> str:
    """Return a folder's name for a federation, whose id a server makes up."""
    if re.fullmatch(r"[0-9a-f]{1,32}", federation):
        return federation
    return "x" + hashlib.sha256(federation.encode()).hexdigest()[:31]


def _is_bounded(about: Mapping[str, Any]) -> bool:
    """Whether an example, or a picture's pixels, are as many as a participant's may be."""
    side: Any = about.get("image_size", 0)
    shape: Any = about.get("input_shape", [])
    sizes = [side, *shape] if isinstance(shape, list) else [None]
    if not all(isinstance(size, int) and 0 <= size <= MOST_NUMBERS for size in sizes):
        return False
    return bool(max(side**2, math.prod(shape)) <= MOST_NUMBERS)
