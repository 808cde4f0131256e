"""Files: who can read what a participant keeps, and names that lead astray."""

import hashlib
import json
import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from client_app.data.prepare import prepare_data
from client_app.worker.link import _make_private
from common.config import ClientSection
from common.errors import CheckpointError, MHpFedHNError
from experiments.__main__ import main
from experiments.console import make_console, say
from experiments.deploy.superlink import of_participants, on_a_line
from experiments.report.clients import draw_clients
from experiments.report.runs import find_run
from server_app.output.checkpoint import load_checkpoint, save_checkpoint
from server_app.output.curves import draw_curves
from tests.support.outputs import client_rows
from tests.support.tiny import run_tiny, tiny_config, trusting

Patch = pytest.MonkeyPatch


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


@pytest.mark.parametrize("file", ["manifest.json", "meta.json"])
def test_a_checkpoint_that_is_nested_without_end_is_passed_over(tmp_path: Path, file: str) -> None:
    for server_round in (1, 2):
        tensors = {"w": torch.full((2,), float(server_round))}
        meta = {"round": server_round}
        save_checkpoint(tmp_path, tensors=tensors, meta=meta, keep=2)
    newest = max(tmp_path.glob("checkpoint-*"))
    (newest / file).write_text("[" * 200_000)
    if file == "meta.json":  # sealed, as who can write there would
        manifest = json.loads((newest / "manifest.json").read_text())
        digest = hashlib.sha256((newest / file).read_bytes()).hexdigest()
        manifest["files"][file] = {"sha256": digest, "bytes": 200_000}
        (newest / "manifest.json").write_text(json.dumps(manifest))
    assert load_checkpoint(tmp_path).meta["round"] == 1


def test_what_is_printed_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    say(make_console(), "contract of x\x1b]0;owned\x07\x9b31m\nnext")
    assert capsys.readouterr().out == "contract of x ]0;owned  31m\nnext\n"


def test_what_a_node_sends_writes_one_line_of_the_superlinks_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("a-log")
    logger.addFilter(on_a_line)
    logger.warning("asked for %s, %d times", "x\n\x1b[2Jall is fine" + "y" * 9000, 3)
    logger.warning("a: %r", ValueError("\x1b]0;owned\x07"))
    assert all("\x1b" not in r.getMessage() and "\n" not in r.getMessage() for r in caplog.records)
    assert caplog.messages[0].endswith(", 3 times")
    assert max(map(len, caplog.messages)) < 2100


def test_what_strangers_ask_writes_no_line() -> None:
    def line(path: str) -> logging.LogRecord:
        asked = ("10.0.0.1:80", "POST", path, "1.1", 401)
        return logging.LogRecord(
            "uvicorn.access", 20, "", 0, '%s - "%s %s HTTP/%s" %d', asked, None
        )

    assert not of_participants(line("/known"))
    assert not of_participants(line("/health"))
    assert of_participants(line("/v1/fleet/push-messages"))


ESCAPES = "x\x1b]0;OWNED\x07[link=javascript:alert(1)]y[/link]"


@pytest.mark.parametrize("command", ["status", "show"])
def test_a_folder_that_somebody_handed_over_orders_no_terminal_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    config = tiny_config(tmp_path, rounds=1)
    run_tiny(config)
    folder = Path(config.run.output_dir)
    for name in ("summary.json", "attendance.json", "config.json"):
        found = json.loads((folder / name).read_text())
        found |= {key: ESCAPES for key in ("status", "reason", "method") if key in found}
        for row in found.get("participants", []):
            row |= {"client_id": ESCAPES, "rejected": ESCAPES}
        (folder / name).write_text(json.dumps(found))
    assert main([command, str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "OWNED" in printed
    assert "\x1b]0" not in printed
    assert "\x07" not in printed
    page = tmp_path / "page.html"
    assert main(["status", str(folder), "--html", str(page)]) == 0
    assert "javascript:alert" in page.read_text()
    assert "href" not in page.read_text()
    assert main(["compare", str(folder), "--markdown"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_what_is_read_of_a_folder_that_was_handed_over_is_bounded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=1)
    run_tiny(config)
    table = Path(config.run.output_dir) / "clients.csv"
    table.unlink()
    table.symlink_to("/dev/zero")
    assert main(["status", config.run.output_dir]) == 2
    state = tmp_path / "state"
    (state / "models").mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    (state / "join.lock").symlink_to(tmp_path / "mine")
    assert main(["status", str(state)]) == 0
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_worker_makes_its_owners_folders_alone(tmp_path: Path) -> None:
    _make_private(tmp_path / "srv" / "state" / "worker")
    for name in ("srv", "srv/state", "srv/state/worker"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_runs_with_other_seeds_fill_no_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("client_app.data.partitions.MOST_PARTITIONS", 3)
    config = {"dataset": "digits", "num-partitions": 5, "cache-dir": str(tmp_path)}
    for size in (8, 9, 10, 11, 12):
        section = ClientSection.checked({**config, "image-size": size}, "x")
        for seed in range(6):
            folder = prepare_data(section, seed=seed)
        assert len([*folder.glob("partition-*")]) == 3
    assert len([*tmp_path.glob("digits-*.lock")]) == len([*tmp_path.glob("digits-*/")]) == 3


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
