"""Tables about runs for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table
from rich.text import Text

from common.files import printable
from common.messages import weighted_mean
from experiments.report.listing import table_of
from experiments.report.looks import method_label
from experiments.report.runs import ClientRow, Run, gain_of
from experiments.run.progress import clock
from server_app.output.curves import Reference

REFERENCE_ROUNDS = (10, 20, 30, 40)
TOLERANCE = -4
"""Points below a reference from which on a difference is red."""


def run_table(run: Run) -> Table:
    """Sum a run up: what ran, how well, what it cost."""
    summary, last, best = run.summary, run.summary.get("last") or {}, run.summary.get("best")
    micro = macro = "-"
    if last:
        micro = f"{percent(last['accuracy_micro'])} last"
    if last and best:
        if best["round"] != last["round"]:
            micro += f", {percent(best['accuracy_micro'])} in round {int(best['round'])}"
        micro += ", the best on validation"
    if "accuracy_macro" in last:
        macro = f"{percent(last['accuracy_macro'])}, standard deviation over clients "
        macro += percent(last.get("accuracy_std"))
    table = Table(title=Text(f"Run {run.name}"), title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    color = "green" if run.status == "completed" else "red"
    traffic = [f"{float(summary.get(f'bytes_{way}', 0)) / 1e6:,.1f} MB {way}"
               for way in ("down", "up")]  # fmt: skip
    rows = {
        "status": run.status,
        "reason": str(summary.get("reason") or ""),
        "method": method_label(run.method),
        "data": str(run.config.get("dataset", "?")),
        "models": ", ".join(dict.fromkeys(run.families().values())) or "?",
        "clients": str(summary.get("num_clients", "?")),
        "rounds": f"{summary.get('rounds', len(run.rows))} of {run.config.get('rounds', '?')}",
        "micro accuracy": micro,
        "macro accuracy": macro,
        "worst 10 % of clients": percent(last.get("accuracy_worst10")),
        "traffic": ", ".join(traffic),
        "time": clock(float(summary.get("seconds", 0.0))),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(printable(value), color if name == "status" else ""))
    return table


def family_table(run: Run) -> Table:
    """Compare the architectures of a run, from the newest evaluation of every client."""
    measured = ("alone", "gain (points)") if run.gain else ()
    names = ("clients", "parameters", "test examples", "micro", "mean", "worst", *measured)
    table = table_of("model", *names, numbers=range(1, 9))
    families, groups = run.families(), dict[str, list[ClientRow]]()
    for client in run.clients:
        groups.setdefault(families[client.client_id], []).append(client)
    for name, clients in groups.items():
        table.add_row(Text(printable(name)), *_family_cells(clients)[: len(names)])
    if len(groups) > 1:
        table.add_section()
        table.add_row("all", *_family_cells(run.clients)[: len(names)])
    return table


def reference_table(run: Run, reference: Reference) -> Table:
    """Compare micro accuracy with a reference curve at rounds 10, 20, 30, 40 and the last one."""
    table = table_of("round", "this run", "reference", "difference (points)", numbers=range(4))
    own = {int(row["round"]): row.get("accuracy_micro") for row in run.rows}
    theirs = dict(zip(reference.rounds, reference.accuracy, strict=True))
    last = max(own.keys() & theirs.keys(), default=0)
    for number in sorted({*REFERENCE_ROUNDS, last} - {0}):
        mine, other = own.get(number), theirs.get(number)
        if mine is None or other is None:
            continue
        points = 100 * (mine - other)
        color = "green" if points >= TOLERANCE else "red"
        difference = f"[{color}]{points:+.1f}[/{color}]"
        table.add_row(str(number), percent(mine), percent(other), difference)
    return table


def percent(value: float | None) -> str:
    """Write a fraction as per cent; a dash when there is none.

    >>> percent(0.5234), percent(None)
    ('52.3 %', '-')
    """
    return "-" if value is None else f"{100 * value:.1f} %"


def _family_cells(clients: Sequence[ClientRow]) -> list[str]:
    sizes = sorted({client.num_parameters for client in clients})
    tests = sum(client.num_test for client in clients)
    correct = sum(client.accuracy * client.num_test for client in clients)
    alone = [(c.num_test, c.alone) for c in clients if c.alone is not None]
    gain = gain_of(clients)
    return [
        str(len(clients)),
        " - ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1]))),
        f"{tests:,}",
        percent(correct / tests),
        percent(fmean(client.accuracy for client in clients)),
        percent(min(client.accuracy for client in clients)),
        percent(weighted_mean(alone) if alone else None),
        f"{100 * gain.micro:+.1f}" if gain else "-",
    ]
