"""Decode a source once; afterwards every process maps the same uint8 file.

Layout of a cache entry: `images.npy` (N, channels, size, size) uint8, or (N, ...) of examples that
are no pictures; `labels.npy` (N, ...); one file for each array of a `Division`; `meta.json`. Its
name holds a hash of the source's fingerprint, so a changed source is a new entry. An entry appears
by one rename, complete or not at all, under a lock that dies with its process. Folders and files
are their owner's alone: pictures of a participant may be among them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from client_app.data.decode import fill
from client_app.data.source import Division, Examples, Source
from common.errors import DataError
from common.files import PRIVATE, private_folder, replace_file, sync

log = logging.getLogger(__name__)

FORMAT = 4
CACHE_VARIABLE = "MH_PFEDHN_CACHE"
LOCK_TIMEOUT_S = 3600.0
MOST_SIZES = 3
"""Of one source that are kept decoded."""
IMAGES, LABELS, META = "images.npy", "labels.npy", "meta.json"


@dataclass(frozen=True)
class DecodedDataset:
    """A cache entry, opened; drawn partitions are stored in its folder too.

    Images (N, channels, size, size) uint8 are memory-mapped read-only, labels (N,) int64, or (N, C)
    bool or float32, in memory; mean and std normalise each channel, in units of full intensity; all
    else as `Examples` has it.
    """

    folder: Path
    images: NDArray[Any]
    labels: NDArray[Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    division: Division = field(default_factory=Division)

    @property
    def in_channels(self) -> int:
        """What a model is built for: channels, or of a table its columns."""
        return int(self.images.shape[1])


def cache_root(cache_dir: str) -> Path:
    """Return the cache folder: `cache-dir`, else $MH_PFEDHN_CACHE, else ~/.cache/mh-pfedhn."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/mh-pfedhn"
    return Path(chosen).expanduser().resolve()


def open_dataset(
    source: Source, *, name: str, image_size: int, cache_dir: str = "", anew: bool = False
) -> DecodedDataset:
    """Open the cache entry of a source, decoding it first when there is none or it is damaged.

    `anew` decodes it in any case: what a function returns may have changed unseen.

    Raises DataError where the source cannot be read, or the cache folder cannot be written.
    """
    facts = source.fingerprint()
    digest, origin = _digest([FORMAT, name, image_size, facts]), _digest([name, *facts[:2]])
    safe_name = re.sub(r"[^A-Za-z0-9]+", "-", name)[:40]
    folder = cache_root(cache_dir) / f"{safe_name}-{image_size}-{digest[:16]}"
    found = None if anew else _open_entry(folder)
    if found is None:
        with entry_lock(folder):
            found = None if anew else _open_entry(folder)
            found = found or _build_entry(source, folder, image_size, origin)
            _prune(folder, origin)
    return found


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _prune(newest: Path, source: str) -> None:
    """Drop a source's other entries, but the last ones: each is all of its pictures.

    Whoever starts a run says how large pictures are, and which classes there are. Processes that
    have an entry open keep it.
    """
    found = []
    for folder in newest.parent.iterdir():
        try:
            if json.loads((folder / META).read_text())["source"] == source and folder != newest:
                found.append((folder.stat().st_mtime_ns, folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for _, folder in sorted(found)[: -(MOST_SIZES - 1)]:
        log.info("%s is dropped: pictures of the same source in another size", folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


@contextmanager
def entry_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache entry, across processes and threads; DataError after an hour."""
    try:
        private_folder(folder.parent)
        with FileLock(f"{folder}.lock", timeout=LOCK_TIMEOUT_S, mode=PRIVATE):
            yield
    except Timeout as error:
        raise DataError(
            f"another process has held {folder}.lock for over {LOCK_TIMEOUT_S:.0f} s. If none is "
            "decoding, remove the file."
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot write the cache {folder.parent}: {error}. Set cache-dir (or "
            f"${CACHE_VARIABLE}) to a folder that this process can write, with enough space."
        ) from error


def _build_entry(source: Source, folder: Path, image_size: int, origin: str) -> DecodedDataset:
    started = time.monotonic()
    examples = source.read(image_size)
    if not len(examples.labels):
        raise DataError(f"{folder.name}: the data set has no examples.")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(mode=0o700)
    try:
        _write_entry(examples, draft, image_size, origin)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    seconds = time.monotonic() - started
    log.info("decoded %d examples into %s in %.1f s", len(examples.labels), folder, seconds)
    found = _open_entry(folder)
    if found is None:
        raise DataError(
            f"cache entry {folder} is damaged right after it was written. Check the disk, or set "
            "cache-dir to a folder on another one."
        )
    return found


def _write_entry(examples: Examples, draft: Path, image_size: int, origin: str) -> None:
    shape = examples.shape or (len(examples.mean), image_size, image_size)
    images = np.lib.format.open_memmap(
        draft / IMAGES, mode="w+", dtype=examples.dtype, shape=(len(examples.labels), *shape)
    )
    fill(images, examples.read_example)
    images.flush()
    del images
    arrays = {LABELS: examples.labels}
    arrays |= {f"{name}.npy": values for name, values in examples.division.arrays().items()}
    for name, values in arrays.items():
        np.save(draft / name, values, allow_pickle=False)
    files = {}
    for name in (IMAGES, *arrays):
        (path := draft / name).chmod(PRIVATE)
        sync(path)
        facts = path.stat()
        files[name] = {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "crc32": _crc32(path)}
    meta = {"num_classes": examples.num_classes, "mean": examples.mean, "std": examples.std}
    meta |= {"about": dict(examples.about), "source": origin}
    replace_file(draft / META, json.dumps(meta | {"files": files}, indent=1), mode=PRIVATE)


def _open_entry(folder: Path) -> DecodedDataset | None:
    """Open a cache entry; None when there is none or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / META).read_text())
        for name, facts in meta["files"].items():
            _check_file(folder / name, facts)
        division = {
            Path(name).stem: np.load(folder / name, allow_pickle=False)
            for name in meta["files"]
            if name not in (IMAGES, LABELS)
        }
        return DecodedDataset(
            folder=folder,
            images=np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False),
            labels=np.load(folder / LABELS, allow_pickle=False),
            num_classes=int(meta["num_classes"]),
            mean=tuple(meta["mean"]),
            std=tuple(meta["std"]),
            about=meta["about"],
            division=Division(**division),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("cache entry %s is damaged (%s); building it again", folder, error)
        return None


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    """Raise ValueError when a file is not the one that was written.

    The checksum is computed only when the time differs (the cache was copied, or somebody wrote):
    every client process comes through here.
    """
    facts = path.stat()
    if facts.st_size != expected["size"]:
        raise ValueError(f"{path.name} has {facts.st_size} bytes, not {expected['size']}")
    if facts.st_mtime_ns != expected["mtime_ns"] and _crc32(path) != expected["crc32"]:
        raise ValueError(f"{path.name} has another checksum")


def _crc32(path: Path) -> int:
    return zlib.crc32(np.memmap(path, mode="r").data)
