"""Tables of what can be run; nothing that takes long is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from experiments.report.sweep_file import SweepFile
from experiments.run.presets import Preset


def preset_table(presets: Sequence[Preset]) -> Table:
    """List presets: name, size, engine and what they show."""
    table = table_of("preset", "clients", "rounds", "engine", "what it shows", numbers=(1, 2))
    for preset in presets:
        size, rounds = preset.engine.num_clients, preset.config.run.rounds
        cells = (str(size), str(rounds), preset.engine.name, preset.description)
        table.add_row(f"[bold]{preset.name}[/]", *cells)
    return table


def study_table(studies: Mapping[str, SweepFile]) -> Table:
    """List studies: name, number of runs and what they show; `mh-pfedhn sweep NAME` runs them."""
    table = table_of("study", "runs", "what it shows", numbers=(1,))
    for name, study in studies.items():
        table.add_row(f"[bold]{name}[/]", str(study.num_runs), study.description)
    return table


def table_of(*columns: str, numbers: Sequence[int]) -> Table:
    """Return an empty table; the columns whose places are in `numbers` are aligned right."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place in numbers else "left", overflow="fold")
    return table
