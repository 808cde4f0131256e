"""`mh-pfedhn rename`: a participant goes on under another name, with all that it has learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.__main__ import main
from server_app.output.checkpoint import load_checkpoint, save_checkpoint
from tests.support.outputs import client_rows, rows
from tests.support.tiny import HERE, run_tiny, tiny_config, trusting

Capture = pytest.CaptureFixture[str]
NAMES = ("lab.one", "hospital-a", "phone")


def nodes(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [
        {"client-id": name, "partition-id": i, "state-dir": str(folder / "state"),
         **trusting(folder, f"{HERE}:small")}
        for i, name in enumerate(names)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "rule"),
    [("mh-pfedhn", "adam"), ("mh-pfedhn-gd", "kernel"), ("mh-pfedhn-pg", "kernel"),
     ("fedavg", "kernel"), ("pfedhn", "kernel"), ("fedproto", "kernel")],
)  # fmt: skip
def test_it_goes_on_with_what_it_has_learned(
    tmp_path: Path, method: str, rule: str, capsys: Capture
) -> None:
    config = tiny_config(tmp_path, method=method, server_rule=rule, models=f"{HERE}:small",
                         validation_fraction=0.1, rounds=2)  # fmt: skip
    run_tiny(config, node_configs=nodes(tmp_path, *NAMES))
    folder = Path(config.run.output_dir)
    before = load_checkpoint(folder / "checkpoint")
    assert main(["rename", str(folder), "hospital-a", "klinik-b"]) == 0
    assert "mv STATE/hospital-a STATE/klinik-b" in "".join(capsys.readouterr().out.splitlines())
    after = load_checkpoint(folder / "checkpoint")
    assert "hospital-a" not in json.dumps({k: x for k, x in after.meta.items() if k != "rows"})
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name.replace("hospital-a", "klinik-b")], tensor), name
    assert {row["client_id"] for row in client_rows(config)} == {"lab.one", "klinik-b", "phone"}
    (tmp_path / "state" / "hospital-a").rename(tmp_path / "state" / "klinik-b")
    on = config.with_overrides({"rounds": 3, "resume-from": str(folder)})
    run_tiny(on, node_configs=nodes(tmp_path, "lab.one", "klinik-b", "phone"))
    assert [row["num_accepted"] for row in rows(on)] == [3, 3, 3]
    last = load_checkpoint(folder / "checkpoint")
    assert len(last.meta["registry"]) == 3
    assert last.tensors.keys() == after.tensors.keys(), "nobody started anew"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hospital-a", "phone", "is a client of this run already"),
        ("nobody", "klinik", "knows no 'nobody'"),
        ("hospital-a", "", "no client-id"),
        ("hospital-a", "=1", "no client-id"),
        ("hospital-a", "one", "also stands for 'lab.one'"),
        ("one", "klinik", "knows no 'one'"),
    ],
)
def test_a_name_that_stands_for_something_else_is_refused(
    tmp_path: Path, old: str, new: str, said: str, capsys: Capture
) -> None:
    config = tiny_config(tmp_path, models=f"{HERE}:small", rounds=1)
    run_tiny(config, node_configs=nodes(tmp_path, *NAMES))
    assert main(["rename", config.run.output_dir, old, new]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_name_that_is_a_groups_key_is_refused(tmp_path: Path, capsys: Capture) -> None:
    config = tiny_config(tmp_path, models=f"{HERE}:small", rounds=1)
    run_tiny(config, node_configs=nodes(tmp_path, *NAMES))
    place = Path(config.run.output_dir) / "checkpoint"
    key = next(iter(load_checkpoint(place).meta["learned"]["hypernet"]["heads"]))
    assert main(["rename", config.run.output_dir, "phone", key]) == 2
    assert "also stands for" in capsys.readouterr().err
    checkpoint = load_checkpoint(place)
    assert save_checkpoint(place, tensors=checkpoint.tensors, meta=checkpoint.meta)
