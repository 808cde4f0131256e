"""Files that are whole whenever they are there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

PRIVATE = 0o600
"""Mode of a file that holds data, weights or keys: for its owner alone."""


def replace_file(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one, never a part.

    Parameters
    ----------
    path
        In a folder that exists.
    data
        Text is written as UTF-8, its line ends as they are.
    mode
        Permissions of the new file, from its first byte on; the process's umask takes from them.

    Raises
    ------
    OSError
        The folder is not writable or the disk is full. The old file is intact.
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
