"""Checkpoints: whole or not there, and the one before is never lost."""

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError
from server_app.output.checkpoint import latest, load_checkpoint, save_checkpoint


def save(folder: Path, number: int, *, keep: int = 3) -> Path:
    tensors = {"a": torch.full((4, 3), float(number)), "step": torch.tensor(float(number))}
    return save_checkpoint(folder, tensors=tensors, meta={"round": number}, keep=keep)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Make the operating system refuse larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "client/7 é": torch.empty(0),
    }
    meta = {"round": 7, "clients": [["a", 3]], "nested": {"x": None}}
    path = save_checkpoint(tmp_path / "new" / "folder", tensors=tensors, meta=meta)
    for where in (path, tmp_path / "new" / "folder"):
        loaded = load_checkpoint(where)
        assert loaded.path == path
        assert loaded.meta == meta
        assert loaded.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.tensors[name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[name], tensor)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(1, 13):
        save(tmp_path, number, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000011", "checkpoint-00000012"]
    assert load_checkpoint(tmp_path).meta == {"round": 12}


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "altered"])
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    content = (bad / name).read_bytes()
    if damage == "gone":
        (bad / name).unlink()
    elif damage == "cut":
        (bad / name).write_bytes(content[:-3])
    else:
        (bad / name).write_bytes(content.replace(b"2", b"3").replace(b"\x40", b"\x41"))
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    assert "checkpoint-00000002 is" in caplog.text
    assert "trying the checkpoint before it" in caplog.text
    assert load_checkpoint(tmp_path).meta == {"round": 1}
    with pytest.raises(CheckpointError, match=r"checkpoint-00000002 is (damaged|incomplete)"):
        load_checkpoint(bad)
    assert save(tmp_path, 3).name == "checkpoint-00000003"


def test_nothing_to_load(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: there is none at all"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is none at all"):
        load_checkpoint(tmp_path / "missing")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    big = {"a": torch.zeros(100_000)}
    with (
        largest_file(50_000),
        pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .* are intact; free d"),
    ):
        save_checkpoint(tmp_path, tensors=big, meta={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert load_checkpoint(tmp_path).meta == {"round": 1}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set output-dir to a writable place"):
        save(tmp_path / "file" / "below", 1)


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".writing-abc"
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path).meta == {"round": 1}
    save(tmp_path, 2)
    assert not leftover.exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="meta must be plain JSON"):
        save_checkpoint(tmp_path, tensors={}, meta={"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="keep = 0: at least one"):
        save(tmp_path, 1, keep=0)
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="has format version 9; this program reads 1"):
        load_checkpoint(path)
