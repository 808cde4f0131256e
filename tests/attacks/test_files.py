"""Files: who can read what a participant keeps, and names that lead astray."""

import os
from pathlib import Path

import torch

from server_app.output.checkpoint import load_checkpoint, save_checkpoint
from tests.support.tiny import run_tiny, tiny_config


def test_what_participants_keep_is_their_owners_alone(tmp_path: Path) -> None:
    state, cache = tmp_path / "deep" / "state", tmp_path / "cache"
    before = os.umask(0o022)
    try:
        config = tiny_config(tmp_path, state_dir=str(state), partition="pathological", rounds=1)
        run_tiny(config)
    finally:
        os.umask(before)
    found = [state.parent, cache, *state.parent.rglob("*"), *cache.rglob("*")]
    assert {"personal_model.safetensors", "images.npy", "federation.json"} <= {
        p.name for p in found
    }
    assert [str(path) for path in found if path.stat().st_mode & 0o077] == []


def test_a_folder_with_an_odd_digit_is_no_checkpoint(tmp_path: Path) -> None:
    """int() knows no superscript, and isdigit() does."""
    tensors = {"phi": torch.ones(2)}
    saved = save_checkpoint(tmp_path, tensors=tensors, meta={})
    for name in ("checkpoint-²", "checkpoint-٣"):
        (tmp_path / name).mkdir()
    assert load_checkpoint(tmp_path).path == saved
    assert save_checkpoint(tmp_path, tensors=tensors, meta={}).name == "checkpoint-00000002"
