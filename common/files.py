"""Files that are whole whenever they are there, and folders that a name cannot lead astray."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError

PRIVATE = 0o600
"""Mode of a file that holds data, weights or keys: for its owner alone."""

_FORMULA = re.compile(r"^[\s=+\-@]|;|\s$")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def replace_file(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one, never a part.

    Text is written as UTF-8, its line ends as they are. The new file has the permissions `mode`,
    less the process's umask, from its first byte on. After an OSError the old file is intact.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(draft, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


DEFAULT_ROOT = Path("~/mh-pfedhn-runs")
ROOT_VARIABLE = "MH_PFEDHN_RUNS"


def printable(text: str) -> str:
    """Return a line of a text of others, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def is_shown_as_is(text: str) -> bool:
    """Whether terminals and spreadsheets show a text of others as it stands: no escapes, one cell.

    >>> [is_shown_as_is(text) for text in ("site-a", "=1+1", "＝1+1", "a;=1+1", " a")]
    [True, False, False, False, False]
    """
    return text.isprintable() and not _FORMULA.search(unicodedata.normalize("NFKC", text))


def private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for its owner alone; raise OSError."""
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def closed_folder(path: Path) -> None:
    """Make a `private_folder`, or close one that is there to others; raise OSError."""
    private_folder(path)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)


MOST_READ = 1 << 26
"""Bytes of a file of JSON, which others may have made."""
MOST_ROWS = 1 << 30
"""And of one with a row for each client and round."""


def read_file(path: Path, most: int = MOST_READ) -> bytes:
    """Read a file that others may have made: a regular one, no link, of at most so many bytes.

    Raises OSError where it is another, or is not there.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            raise OSError(errno.EINVAL, f"no regular file of at most {most:,} bytes", str(path))
        return file.read(most)


def parsed(text: bytes | str) -> Any:
    """Parse JSON of others; raise ValueError where it is none, or too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} when there is no such file."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = parsed(read_file(path))
    return content


def read_rows(path: Path, *, skips_damaged: bool = False) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a line that is still being written is left out.

    `skips_damaged` leaves out those that a full disk has cut short; else they raise ValueError.
    """
    if not path.is_file():
        return []
    rows, text = [], read_file(path, MOST_ROWS).decode()
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            rows += [parsed(line)] if line.strip() else []
        except ValueError:
            if not skips_damaged:
                raise
    return rows


def best_round(
    rows: Iterable[Mapping[str, Any]], by: str = "accuracy_validation"
) -> Mapping[str, Any] | None:
    """Return the row of metrics.jsonl that is best on validation examples; None without any."""
    validated = [row for row in rows if by in row]
    return max(validated, key=lambda row: row[by], default=None)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries (not on Windows, which cannot), to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safe_name(name: str) -> str:
    """Return the name if it can be a single folder, else raise ConfigError (no path tricks)."""
    if not _SAFE_NAME.fullmatch(name):
        raise ConfigError(
            f"client-id {name!r} cannot name a folder; use up to 100 letters, digits, '.', '_' and "
            "'-', not starting with '.' or '-'."
        )
    return name


def state_folder(state_dir: str, client_id: str) -> Path:
    """Return the folder of one client below `state_dir`."""
    return Path(state_dir).expanduser() / safe_name(client_id)


def output_root() -> Path:
    """Return the folder that holds run folders: $MH_PFEDHN_RUNS, or one below the user's home."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser().absolute()


def natural_key(client_id: str) -> list[tuple[int, int, str]]:
    """Sort key that puts client 10 after client 9."""
    parts = re.split(r"(\d+)", client_id)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]
