"""Tables about runs for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from experiments.report.runs import ClientRow, Run
from experiments.run.presets import Preset
from experiments.run.progress import clock
from experiments.sweep.plan import Plan
from server_app.output.figures import METHODS, Reference

REFERENCE_ROUNDS = (10, 20, 30, 40)


def preset_table(presets: Sequence[Preset]) -> Table:
    """List presets: name, size, engine and what they show."""
    table = _table("preset", "clients", "rounds", "engine", "what it shows", numbers=(1, 2))
    for preset in presets:
        table.add_row(
            f"[bold]{preset.name}[/]",
            str(preset.engine.num_clients),
            str(preset.config.run.rounds),
            preset.engine.name,
            preset.description,
        )
    return table


def study_table(plans: Sequence[Plan]) -> Table:
    """List studies: name, number of runs and what they show; `mh-pfedhn sweep NAME` runs them."""
    table = _table("study", "runs", "what it shows", numbers=(1,))
    for plan in plans:
        table.add_row(f"[bold]{plan.file.stem}[/]", str(len(plan.cells)), plan.description)
    return table


def run_table(run: Run) -> Table:
    """Sum a run up: what ran, how well, what it cost."""
    summary, last = run.summary, run.summary.get("last") or {}
    method = str(summary.get("method", "?"))
    table = Table(title=f"Run {run.name}", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    rows = {
        "status": _status(summary),
        "reason": escape(str(summary.get("reason") or "")),
        "method": METHODS.get(method, method),
        "data": str(run.config.get("dataset", "?")),
        "models": ", ".join(dict.fromkeys(run.families().values())) or "?",
        "clients": str(summary.get("num_clients", "?")),
        "rounds": f"{summary.get('rounds', len(run.rows))} of {run.config.get('rounds', '?')}",
        "micro accuracy": _last_and_best(summary),
        "macro accuracy": _macro(last),
        "worst 10 % of clients": percent(last.get("accuracy_worst10")),
        "traffic": f"{_mb(summary, 'bytes_down')} down, {_mb(summary, 'bytes_up')} up",
        "time": clock(float(summary.get("seconds", 0.0))),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def family_table(run: Run) -> Table:
    """Compare the architectures of a run, from the newest evaluation of every client."""
    table = _table(
        "model", "clients", "parameters", "test examples", "micro", "mean", "worst",
        numbers=range(1, 7),
    )  # fmt: skip
    names = run.families()
    groups: dict[str, list[ClientRow]] = {}
    for client in run.clients:
        groups.setdefault(names[client.client_id], []).append(client)
    for name, clients in groups.items():
        table.add_row(name, *_family_cells(clients))
    if len(groups) > 1:
        table.add_section()
        table.add_row("all", *_family_cells(run.clients))
    return table


def reference_table(run: Run, reference: Reference) -> Table:
    """Compare micro accuracy with a reference curve at rounds 10, 20, 30, 40 and the last one."""
    table = _table("round", "this run", "reference", "difference (points)", numbers=range(4))
    own = {int(row["round"]): row.get("accuracy_micro") for row in run.rows}
    theirs = dict(zip(reference.rounds, reference.accuracy, strict=True))
    last = max(own.keys() & theirs.keys(), default=0)
    for number in sorted({*REFERENCE_ROUNDS, last} - {0}):
        mine, other = own.get(number), theirs.get(number)
        if mine is None or other is None:
            continue
        points = 100 * (mine - other)
        color = "green" if points >= -4 else "red"
        table.add_row(
            str(number), percent(mine), percent(other), f"[{color}]{points:+.1f}[/{color}]"
        )
    return table


def percent(value: float | None) -> str:
    """Write a fraction as per cent; a dash when there is none.

    >>> percent(0.5234), percent(None)
    ('52.3 %', '-')
    """
    return "-" if value is None else f"{100 * value:.1f} %"


def _table(*columns: str, numbers: Sequence[int]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place in numbers else "left")
    return table


def _family_cells(clients: Sequence[ClientRow]) -> list[str]:
    sizes = sorted({client.num_parameters for client in clients})
    tests = sum(client.num_test for client in clients)
    correct = sum(client.accuracy * client.num_test for client in clients)
    return [
        str(len(clients)),
        " - ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1]))),
        f"{tests:,}",
        percent(correct / tests),
        percent(fmean(client.accuracy for client in clients)),
        percent(min(client.accuracy for client in clients)),
    ]


def _status(summary: Mapping[str, Any]) -> str:
    status = str(summary.get("status", "unknown"))
    color = "green" if status == "completed" else "red"
    return f"[{color}]{status}[/{color}]"


def _last_and_best(summary: Mapping[str, Any]) -> str:
    last, best = summary.get("last"), summary.get("best")
    if not last or not best:
        return "-"
    return (
        f"[bold]{percent(last['accuracy_micro'])}[/] last, "
        f"{percent(best['accuracy_micro'])} best (round {int(best['round'])})"
    )


def _macro(last: Mapping[str, Any]) -> str:
    if "accuracy_macro" not in last:
        return "-"
    return (
        f"{percent(last['accuracy_macro'])}, standard deviation over clients "
        f"{percent(last.get('accuracy_std'))}"
    )


def _mb(summary: Mapping[str, Any], key: str) -> str:
    return f"{float(summary.get(key, 0)) / 1e6:,.1f} MB"
