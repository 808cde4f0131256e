"""Decoded once, drawn once, loaded once; damaged or changed files are noticed."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app.data.cache import cache_root
from client_app.data.examples import (
    LOADED,
    ClientData,
    LoadedClients,
)
from client_app.data.prepare import prepare_data
from common.config import ClientSection
from common.errors import DataError
from tests.unit.client_app.pictures import (
    changed,
    load,
    random_pixels,
    write_parquet,
)


def test_repeated_calls_share_one_object_also_between_threads(section: ClientSection) -> None:
    found: list[ClientData] = []
    threads = [threading.Thread(target=lambda: found.append(load(section, 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(client is found[0] for client in found)


def test_memory_is_bounded_and_drops_the_oldest(section: ClientSection) -> None:
    first, second = load(section, 0), load(section, 1)
    kept = LoadedClients(first.num_bytes + second.num_bytes)
    for key, data in (("a", first), ("b", second), ("a", second), ("c", second)):
        assert kept.get(key, lambda data=data: data) is (first if key == "a" else second)
    assert kept.get("a", lambda: second) is first  # asked for again before "c" came: "b" went
    assert kept.get("b", lambda: first) is first


def test_prepare_is_idempotent_and_decodes_once(section: ClientSection) -> None:
    folder = prepare_data(section, seed=42)
    facts = [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())]
    assert [name for name, _ in facts][:3] == ["images.npy", "labels.npy", "meta.json"]
    assert len(facts) == 4  # and the partition
    assert prepare_data(section, seed=42) == folder
    load(section, 4)
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())] == facts


def test_a_changed_source_is_not_served_stale(section: ClientSection) -> None:
    before = prepare_data(section, seed=42)
    path = Path(section.data_dir, "cifar10", "train.parquet")
    write_parquet(path, 255 - random_pixels(300, 32, 32, 3), np.arange(300) % 10)
    after = prepare_data(section, seed=42)
    assert before != after
    assert np.array_equal(255 - np.load(before / "images.npy"), np.load(after / "images.npy"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
def test_damaged_cache_is_built_again(
    section: ClientSection, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepare_data(section, seed=42)
    expected = load(section, 1)
    damage(folder / name)
    LOADED.clear()
    with caplog.at_level(logging.WARNING):
        again = load(section, 1)
    assert f"{folder} is damaged" in caplog.text
    assert torch.equal(again.train_images, expected.train_images)
    assert torch.equal(again.test_labels, expected.test_labels)


@pytest.mark.parametrize("damage", [_truncate, lambda path: path.write_bytes(b"PK")])
def test_damaged_partition_is_drawn_again(section: ClientSection, damage: Any) -> None:
    folder = prepare_data(section, seed=42)
    expected = load(section, 1)
    damage(next(folder.glob("partition-*.npz")))
    LOADED.clear()
    assert torch.equal(load(section, 1).train_images, expected.train_images)


def test_a_copied_cache_is_accepted(section: ClientSection) -> None:
    folder = prepare_data(section, seed=42)
    os.utime(folder / "images.npy", ns=(1, 1))
    inode = (folder / "images.npy").stat().st_ino
    prepare_data(section, seed=42)
    assert (folder / "images.npy").stat().st_ino == inode


def test_leftover_of_a_killed_process_is_removed(section: ClientSection) -> None:
    folder = prepare_data(section, seed=42)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    draft = folder.with_name(f".{folder.name}.draft")
    draft.mkdir()
    (draft / "images.npy").write_bytes(b"half")
    assert prepare_data(section, seed=42) == folder
    assert not draft.exists()


def test_cache_root_from_argument_variable_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MH_PFEDHN_CACHE", str(tmp_path / "variable"))
    assert cache_root(str(tmp_path / "given")) == tmp_path / "given"
    assert cache_root("") == tmp_path / "variable"
    monkeypatch.delenv("MH_PFEDHN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root("") == tmp_path / ".cache" / "mh-pfedhn"


def test_cache_that_cannot_be_written(section: ClientSection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the cache .*Set cache-dir"):
        prepare_data(changed(section, cache_dir=str(tmp_path / "file" / "cache")), seed=42)
