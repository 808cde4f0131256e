"""Files: who can read what a participant keeps, and names that lead astray."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError, MHpFedHNError
from experiments.report.clients import draw_clients
from experiments.report.runs import find_run
from server_app.output.checkpoint import load_checkpoint, save_checkpoint
from server_app.output.curves import draw_curves
from tests.support.outputs import client_rows
from tests.support.tiny import run_tiny, tiny_config, trusting


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


def test_a_folder_that_others_can_read_is_closed(tmp_path: Path) -> None:
    """It may be of a time when that was not looked after."""
    (tmp_path / "state" / "0").mkdir(parents=True, mode=0o755)
    run_tiny(tiny_config(tmp_path, state_dir=str(tmp_path / "state"), rounds=1), num_clients=1)
    assert (tmp_path / "state" / "0").stat().st_mode & 0o777 == 0o700


def test_links_in_a_run_folder_are_not_followed(tmp_path: Path) -> None:
    """Somebody who may write there must not make the server write elsewhere."""
    config, victim = tiny_config(tmp_path, rounds=2), tmp_path / "victim"
    folder = Path(config.run.output_dir)
    folder.mkdir()
    names = ("metrics.jsonl", "config.json", "clients.csv", "summary.json")
    for name in (*names, *(f"{name}.tmp" for name in names)):
        (folder / name).symlink_to(victim)
    run_tiny(config)
    assert not victim.exists()
    assert all((folder / name).is_file() and not (folder / name).is_symlink() for name in names)


def test_a_folder_with_an_odd_digit_is_no_checkpoint(tmp_path: Path) -> None:
    """int() knows no superscript, and isdigit() does."""
    tensors = {"phi": torch.ones(2)}
    saved = save_checkpoint(tmp_path, tensors=tensors, meta={})
    for name in ("checkpoint-²", "checkpoint-٣"):
        (tmp_path / name).mkdir()
    assert load_checkpoint(tmp_path).path == saved
    assert save_checkpoint(tmp_path, tensors=tensors, meta={}).name == "checkpoint-00000002"


@pytest.mark.parametrize("meta", [{}, [], {"rows": 3, "registry": None}])
def test_a_whole_checkpoint_of_something_else_is_named(tmp_path: Path, meta: object) -> None:
    run_tiny(tiny_config(tmp_path, rounds=1))
    folder = tmp_path / "run" / "checkpoint"
    known = load_checkpoint(folder)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    content = {**known.meta, **meta} if meta and isinstance(meta, dict) else meta
    made = save_checkpoint(folder, tensors=known.tensors, meta=content)  # type: ignore[arg-type]
    assert json.loads((made / "meta.json").read_text()) == content
    config = tiny_config(tmp_path, rounds=2, resume_from=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=rf"{made.name} is whole, but does not hold"):
        run_tiny(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_stands(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=1)
    names = ("$\\frac$", "a_$x^{")
    nodes = [{"client-id": n, "partition-id": i, **trusting(tmp_path)} for i, n in enumerate(names)]
    run_tiny(config, node_configs=nodes)
    assert {row["client_id"] for row in client_rows(config)} == set(names)
    assert draw_clients(find_run(config.run.output_dir)).stat().st_size > 0
    assert draw_curves(tmp_path / "run").stat().st_size > 0


def test_a_full_disk_before_the_first_round_is_a_clear_error(tmp_path: Path) -> None:
    """A tiny file system of its own; whoever may not mount one passes this over."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount")
    try:
        with suppress(OSError):
            (disk / "full").write_bytes(bytes(2**17))
        config = tiny_config(tmp_path, rounds=1, output_dir=str(disk / "run"))
        with pytest.raises(MHpFedHNError, match=r"[Nn]o space|disk"):
            run_tiny(config)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
