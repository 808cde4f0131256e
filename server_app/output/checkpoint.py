"""Save and restore the whole server so that a crash, a full disk or a cut file loses nothing.

A folder holds numbered checkpoints, each a directory of its own:

    checkpoint-00000007/tensors.safetensors   phi, embeddings, Adam moments and step counters
    checkpoint-00000007/meta.json             everything that is not a tensor
    checkpoint-00000007/manifest.json         sha256 and size of the two, written last

A checkpoint is written beside the others under a temporary name, flushed to disk and renamed, so
that a directory with the final name is whole; its checksums are verified all the same before
anything of it is used. safetensors and JSON only. One process at a time may write to a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from common.errors import CheckpointError
from common.files import replace_file, sync

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
_PREFIX, _DRAFT = "checkpoint-", ".writing-"
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: where it came from, its tensors and its JSON."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path, *, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 3
) -> Path:
    """Write the next checkpoint of a folder and drop all but the newest `keep`, at least 1.

    Tensors of any device and shape are copied to the CPU; `meta` is JSON. Returns the directory of
    the new checkpoint. Raises CheckpointError where the disk is full or not writable, or `meta` is
    not JSON; earlier checkpoints are then intact.
    """
    if keep < 1:
        raise CheckpointError(f"keep = {keep}: at least one checkpoint must be kept.")
    try:
        text = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's meta must be plain JSON: {error}.") from error
    draft: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder.glob(_DRAFT + "*"))
        known = _numbered(folder)
        final = folder / f"{_PREFIX}{_number(known[-1]) + 1 if known else 1:08d}"
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))
        _write(draft, tensors, text)
        draft.rename(final)
        sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        _remove([draft] if draft else [])
        raise CheckpointError(
            f"cannot write a checkpoint to {folder}: {error}. Earlier checkpoints are intact; "
            "free disk space, or set output-dir to a writable place."
        ) from error
    _remove(_numbered(folder)[:-keep])
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint: the one that `folder` is, or the newest good one of those it holds.

    A checkpoint that is cut short or altered is logged and passed over for the one before it,
    unless it was asked for by its own path. Raises CheckpointError where nothing whole is there,
    naming every checkpoint that was tried with its fault.
    """
    if folder.name.startswith(_PREFIX) or (folder / MANIFEST).exists():
        return _load_one(folder)
    found, faults = _newest(folder, _load_one)
    if found is None:
        raise CheckpointError(
            f"no whole checkpoint in {folder}: {'; '.join(faults) or 'there is none at all'}."
        )
    return found


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder whose checksums hold, or None; log the others."""
    return _newest(folder, _verified)[0]


def _newest(folder: Path, read: Callable[[Path], T]) -> tuple[T | None, list[str]]:
    """Read the newest checkpoint that can be read; return the faults of those passed over too."""
    faults: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            return read(path), faults
        except CheckpointError as error:
            logger.warning("%s; trying the checkpoint before it", error)
            faults.append(str(error))
    return None, faults


def _write(directory: Path, tensors: Mapping[str, Tensor], meta: str) -> None:
    """Write and flush the files, the manifest last."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, directory / TENSORS)
    sync(directory / TENSORS)
    replace_file(directory / META, meta)
    files = {name: _fingerprint(directory / name) for name in (TENSORS, META)}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    replace_file(directory / MANIFEST, json.dumps(manifest, indent=2))
    sync(directory)


def _load_one(path: Path) -> Checkpoint:
    _verified(path)
    try:
        tensors = safetensors.torch.load_file(path / TENSORS)
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(path, tensors, meta)


def _verified(path: Path) -> Path:
    """Return the path if size and checksum of every file are the manifest's, or raise."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {path} has format version {version}; this program reads "
                f"{FORMAT_VERSION}."
            )
        for name in (TENSORS, META):
            found, expected = _fingerprint(path / name), files[name]
            if found != expected:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} has {found['bytes']} bytes and sha256 "
                    f"{found['sha256'][:12]}; its manifest says {expected['bytes']} bytes and "
                    f"{expected['sha256'][:12]}"
                )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {path} is incomplete: {type(error).__name__}: {error}"
        ) from error
    return path


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _numbered(folder: Path) -> list[Path]:
    """Return the checkpoint directories of a folder, oldest first."""
    found = [path for path in folder.glob(_PREFIX + "*") if _is_number(path.name[len(_PREFIX) :])]
    return sorted(found, key=_number)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _number(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _remove(paths: Iterable[Path]) -> None:
    """Delete directories; one that cannot be deleted is logged, for it harms nothing."""
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("cannot delete %s: %s", path, error)
