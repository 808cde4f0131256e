"""A small version of every preset and of every variant of every study: two rounds, tiny data.

Partitions are the presets' and studies' own, as far as four clients and 480 examples allow.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import RunConfig
from experiments.report.plan import Cell, Plan
from experiments.report.sweep_file import STUDIES
from experiments.run.presets import Preset, preset_names
from server_app.output.run_folder import RunFolder
from tests.support.tiny import HERE, MIXED, NUM_CLASSES, run_tiny

CLIENTS = 4
EVIDENCE = "evidence-digits-one"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested elsewhere, and takes twice as long as the run."""
    monkeypatch.setattr(RunFolder, "_draw", lambda self: None)


def ends(study: str) -> Iterator[Cell]:
    """The first and the last cell of each variant's grid, with the first seed."""
    cells = Plan.load(study).cells
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.seed == cells[0].seed:
            found.setdefault(cell.variant, []).append(cell)
    for grid in found.values():
        yield from dict.fromkeys((grid[0], grid[-1]))


def small(config: RunConfig, folder: Path, **more: object) -> RunConfig:
    """The same method, schedule and server; data, models and sizes that take half a second."""
    overrides: dict[str, object] = {
        "rounds": 2,
        "dataset": f"{HERE}:patterns",
        "classes-per-client": min(config.client.classes_per_client, NUM_CLASSES),
        "min-client-examples": min(config.client.min_client_examples, 10),
        "models": MIXED if "," in config.client.models else f"{HERE}:small",
        "global-model": f"{HERE}:small",
        "num-partitions": CLIENTS,
        "absent-clients": min(1, config.client.absent_clients),
        "output-dir": str(folder),
        "image-size": 8,
        "batch-size": 64,
        "chunk-size": 64,
        "embed-dim": 8,
        "hidden-dim": 16,
        "evaluate-every": 1,
        "wait-for-clients-s": 0.0,
        "min-clients": 1,  # some baselines take none of another architecture
        **more,
    }
    return config.with_overrides(overrides)


def run(config: RunConfig) -> dict:
    present = CLIENTS - config.client.absent_clients
    nodes = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(present)]
    run_tiny(config, node_configs=nodes)
    folder = Path(config.run.output_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, config.run.rounds + 1))
    assert rows[-1]["num_failed"] == rows[-1]["num_unanswered"] == 0
    assert 0 <= rows[-1]["accuracy_micro"] <= 1
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name", preset_names())
def test_preset(name: str, tmp_path: Path) -> None:
    config = small(Preset.load(name).config, tmp_path)
    assert run(config)["status"] == "completed"


@pytest.mark.parametrize("name", preset_names(STUDIES))
def test_study(name: str, tmp_path: Path) -> None:
    assert Plan.load(name).description
    places: dict[Path, Path] = {}
    cells = list(ends(name))
    if name.startswith("evidence-") and name != EVIDENCE:
        cells = cells[:2]  # they have the same variants
    for number, cell in enumerate(cells):
        places[cell.folder] = tmp_path / str(number)
        more: dict[str, object] = {}
        if cell.after:
            more = {"resume-from": str(places[cell.after]), "rounds": 3}
        pairs = [f"{k}={v}" for k, v in cell.settings.items() if k != "engine"]
        preset = Preset.load(cell.preset).with_settings(pairs)
        config = small(preset.config, places[cell.folder], **more)
        assert run(config)["status"] == "completed", cell.name
