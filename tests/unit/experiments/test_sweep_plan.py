from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from experiments.report.plan import Cell, Plan
from experiments.report.sweep_file import STUDIES
from experiments.run.presets import Preset, preset_names

GRID = """
preset = "quickstart"
seeds = [1, 2, 3]
output-dir = "runs"
[fixed]
rounds = 5
engine = "inprocess"
num-clients = 4
distill-alpha = 0.5
[variants.hyper]
method = "mh-pfedhn"
[variants.gd]
rounds = 7
[variants.gd.grid]
distill-alpha = [0.1, 0.9]
distill-temperature = [1, 10]
"""


def plan_of(tmp_path: Path, text: str) -> Plan:
    (tmp_path / "s.toml").write_text(text)
    return Plan.load(tmp_path / "s.toml")


def cells_of(plan: Plan, variant: str) -> list[Cell]:
    return [cell for cell in plan.cells if cell.variant == variant]


def test_every_combination_is_a_cell_and_a_later_table_wins(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GRID)
    hyper, gd = cells_of(plan, "hyper"), cells_of(plan, "gd")
    assert plan.folder == tmp_path / "runs"
    assert (len(hyper), len(gd), len(plan.cells)) == (3, 2 * 2 * 3, 15)
    assert [cell.seed for cell in hyper] == [1, 2, 3]
    chosen = [(c.grid["distill-alpha"], c.grid["distill-temperature"], c.seed) for c in gd]
    assert chosen[:4] == [(0.1, 1, 1), (0.1, 1, 2), (0.1, 1, 3), (0.1, 10, 1)]
    assert ({cell.rounds for cell in hyper}, {cell.rounds for cell in gd}) == ({5}, {7})
    assert hyper[0].settings["distill-alpha"] == 0.5


def test_a_cell_runs_exactly_its_settings(tmp_path: Path) -> None:
    cell = cells_of(plan_of(tmp_path, GRID), "gd")[3]
    arguments = cell.arguments()
    assert arguments[:6] == ["run", "quickstart", "--engine", "inprocess", "--seed", "1"]
    assert arguments[6:8] == ["--output-dir", str(cell.folder)]
    pairs = arguments[arguments.index("--set") + 1 :]
    preset = Preset.load("quickstart").with_settings(pairs)
    assert preset.config.distill.distill_alpha == 0.1
    assert preset.config.distill.distill_temperature == 10
    assert (preset.config.run.rounds, preset.engine.num_clients) == (7, 4)
    assert "resume-from" not in " ".join(arguments)
    assert f"resume-from={cell.folder}" in cell.arguments(resume=True)


def test_folder_names_tell_the_settings_that_decide_the_result(tmp_path: Path) -> None:
    names = [cell.name for cell in plan_of(tmp_path, GRID).cells]
    assert len(set(names)) == len(names)
    assert names[3].startswith("gd_distill-alpha=0.1_distill-temperature=1_seed1_")
    more = plan_of(tmp_path, GRID.replace("[0.1, 0.9]", "[0.9, 0.1, 0.3]"))
    assert set(names) < {cell.name for cell in more.cells}
    same = GRID.replace("rounds = 5", 'rounds = 5\ncheckpoint-every = 1\ncache-dir = "c"')
    assert [cell.name for cell in plan_of(tmp_path, same).cells] == names
    other = GRID.replace("rounds = 5", "rounds = 5\nserver-lr = 0.5")
    assert not {cell.name for cell in plan_of(tmp_path, other).cells} & set(names)


def test_paths_are_relative_to_the_sweep_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[config]\ndataset = "digits"\n')
    plan = plan_of(tmp_path, 'preset = "own.toml"\n[fixed]\ndata-dir = "pictures"\n')
    (cell,) = plan.cells
    assert cell.preset == str(tmp_path / "own.toml")
    assert cell.settings["data-dir"] == str(tmp_path / "pictures")
    assert cell.seed == 42


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preset = "quikstart"', "Did you mean 'quickstart'"),
        ('presett = "quickstart"', "unknown key 'presett'. Did you mean 'preset'"),
        ("seeds = [1]", "preset: Field required"),
        ('preset = "quickstart"\n[grid]\nserver-lrr = [1]', "Did you mean 'server-lr'"),
        ('preset = "quickstart"\n[grid]\nrounds = 3', "grid.rounds: Input should be a valid list"),
        ('preset = "quickstart"\n[grid]\nrounds = []', "grid.rounds: List should have at least 1"),
        ('preset = "quickstart"\n[grid]\nrounds = [0]', "rounds = '0' cannot be used"),
        ('preset = "quickstart"\n[grid]\nrounds = [3, 3]', "are the same run"),
        ('preset = "quickstart"\n[fixed]\nseed = 1', "seed cannot be set in a sweep: give seeds"),
        ('preset = "quickstart"\n[variants.a]\nrounds = 1\n[variants.b]\nrounds = 1',
         "are the same run"),
        ('preset = "quickstart"\n[variants.a]\nrounds = 1\ngrid = {rounds = [1]}',
         "variant 'a': rounds is set by itself and in the grid"),
        ('preset = "quickstart"\n[variants.a]\ngrid = [1]', "variants.a.grid: Input should be"),
        ('preset = "quickstart"\ncheckpoints = "all"', "checkpoints: Input should be 'embeddings'"),
        ("preset = ", "is not a TOML file"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, text)
    assert message in str(caught.value)
    assert "s.toml" in str(caught.value)


CHAIN = """
preset = "quickstart"
seeds = [1, 2]
checkpoints = "keep"
output-dir = "runs"
[fixed]
engine = "inprocess"
[variants.first]
absent-clients = 2
[variants.later]
after = "first"
novel-only = true
embedding-lr = 0.03
rounds = 40
"""


def test_a_variant_goes_on_from_the_run_of_its_seed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, CHAIN)
    first, later = cells_of(plan, "first"), cells_of(plan, "later")
    assert [cell.after for cell in later] == [cell.folder for cell in first]
    assert [cell.after for cell in first] == [None, None]
    assert f"resume-from={first[1].folder}" in later[1].arguments()
    changed = plan_of(tmp_path, CHAIN.replace("absent-clients = 2", "absent-clients = 3"))
    renamed = {cell.name for cell in cells_of(changed, "later")}
    assert renamed.isdisjoint(cell.name for cell in later)  # it was learned from something else
    again = later[1].arguments(resume=True)
    assert f"resume-from={later[1].folder}" in again
    assert f"resume-from={first[1].folder}" not in again


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"first"\nnovel', '"frist"\nnovel'),
        ('checkpoints = "keep"\n', ""),
        ("[variants.later]", "[variants.first.grid]\nbatch-size = [1, 2]\n[variants.later]"),
    ],
)
def test_nothing_to_go_on_from_is_explained(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(
        ConfigError, match=r"s.toml: variant 'later': it comes after .* checkpoints"
    ):
        plan_of(tmp_path, CHAIN.replace(old, new))


def test_a_variant_that_would_have_no_rounds_left_is_explained(tmp_path: Path) -> None:
    message = "'later': it goes on after round 12 of 'first' and ends at round 12: it would do"
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, CHAIN.replace("rounds = 40", "rounds = 12"))


def test_the_command_line_wins_and_data_change_no_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GRID)
    common = {"rounds": "2", "data-dir": "/data", "distill-alpha": "0.7"}
    few = Plan.load(tmp_path / "s.toml", {"rounds": "2"}, str(tmp_path / "else"))
    assert few.folder == tmp_path / "else"
    assert {cell.rounds for cell in few.cells} == {2}
    data = Plan.load(tmp_path / "s.toml", {"data-dir": "/data"})
    assert [cell.name for cell in data.cells] == [cell.name for cell in plan.cells]
    assert data.cells[0].settings["data-dir"] == "/data"
    with pytest.raises(ConfigError, match="are the same run"):
        Plan.load(tmp_path / "s.toml", common)
    with pytest.raises(ConfigError, match="Did you mean 'rounds'"):
        Plan.load(tmp_path / "s.toml", {"round": "2"})


def test_studies_are_found_by_name() -> None:
    assert len(preset_names(STUDIES)) >= 8
    for name in preset_names(STUDIES):
        plan = Plan.load(name)
        assert 20 < len(plan.description) < 110
        assert plan.folder.name == name + "-trials" * plan.is_trial
    with pytest.raises(ConfigError, match=r"unknown study 'study-a'\. Did you mean 'study-"):
        Plan.load("study-a")
