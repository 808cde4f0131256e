"""What a run leaves in its folder, as tests read it."""

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.config import RunConfig


def rows(config: RunConfig, *, timed: bool = False) -> list[dict]:
    """Return the lines of metrics.jsonl, without what a clock measured unless `timed`."""
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return (
        found
        if timed
        else [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in found]
    )


def summary(config: RunConfig) -> dict:
    return json.loads((Path(config.run.output_dir) / "summary.json").read_text())


def client_rows(config: RunConfig) -> list[dict[str, str]]:
    with (Path(config.run.output_dir) / "clients.csv").open() as file:
        return list(csv.DictReader(file))


def checkpoints(config: RunConfig) -> list[Path]:
    return sorted((Path(config.run.output_dir) / "checkpoint").iterdir())


def tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the tensors of the newest checkpoint."""
    return load_file(checkpoints(config)[-1] / "tensors.safetensors")


def assert_same_run(a: RunConfig, b: RunConfig) -> None:
    """Compare two runs bit by bit: of equal shapes, on one processor."""
    assert rows(a) == rows(b)
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
