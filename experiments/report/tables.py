"""The numbers of a study as rows of text: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from experiments.report.groups import Group, Stat, Study
from experiments.report.predictors import PREFIX, other_names
from experiments.run.progress import clock

Cell = Callable[[Group], str]
NONE = "-"


@dataclass(frozen=True)
class Column:
    """A column: its header, what it means, and how a group's cell is written."""

    header: str
    meaning: str
    cell: Cell


def _share(key: str) -> Cell:
    return lambda group: percent(group.stat(lambda member: member.last(key)))


def _megabytes(key: str) -> Cell:
    return lambda group: number(group.stat(lambda m: m.total(key) / 1e6), digits=1)


def _best_round(group: Group) -> str:
    found = [m.best("round") for m in group.counted]
    rounds = sorted(int(value) for value in found if value is not None)
    if not rounds:
        return NONE
    return str(rounds[0]) if rounds[0] == rounds[-1] else f"{rounds[0]}-{rounds[-1]}"


def _last_round(group: Group) -> str:
    rounds = sorted({member.rounds for member in group.counted})
    return "-".join(str(r) for r in dict.fromkeys((rounds[0], rounds[-1]))) if rounds else NONE


def _seconds(group: Group) -> str:
    return number(group.stat(lambda member: member.total("seconds_round")), digits=0)


def _others(group: Group) -> str:
    cells = [f"{name} {_share(PREFIX + name)(group)}" for name in other_names(group)]
    return ", ".join(cells) or NONE


COLUMNS: tuple[Column, ...] = (
    Column("micro", "last round: correct of all test examples, %", _share("accuracy_micro")),
    Column("macro", "last round: mean of the clients' accuracies, %", _share("accuracy_macro")),
    Column("std", "last round: standard deviation over clients, points", _share("accuracy_std")),
    Column("worst 10 %", "last round: mean of the worst tenth of the clients, %",
           _share("accuracy_worst10")),
    Column("best", "micro accuracy of the best round, chosen on the test examples: optimistic, %",
           lambda g: percent(g.stat(lambda m: m.best("accuracy_micro")))),
    Column("best at", "the round of it", _best_round),
    Column("rounds", "rounds of the run", _last_round),
    Column("MB up", "all clients to the server, whole run", _megabytes("bytes_up")),
    Column("MB down", "server to all clients, whole run", _megabytes("bytes_down")),
    Column("seconds", "wall clock of all rounds", _seconds),
)  # fmt: skip
OTHERS = Column(
    "other predictor",
    "last round: micro accuracy of what else the method predicts with: the head (FedProto, "
    "FedTGP), the model before its epoch (global: FedAvg + fine-tuning), %",
    _others,
)
SEEDS = Column("seeds", "completed runs with different seeds", lambda g: str(len(g.counted)))


def columns(study: Study) -> tuple[Column, ...]:
    """Return the columns of the page and of Markdown: other predictors only where there are any."""
    some = any(other_names(group) for group in study.groups)
    return (COLUMNS[0], OTHERS, *COLUMNS[1:]) if some else COLUMNS


def status(group: Group) -> str:
    """Say which runs of a group are not in its means, and why.

    An older run of a seed that is there twice is not a fault, and not counted.
    """
    words = [f"seed {m.seed}: {m.left_out}" for m in group.left_out]
    return "; ".join(words) or "completed"


def percent(stat: Stat | None) -> str:
    """Write fractions as per cent with the standard error.

    >>> percent(Stat(0.6123, 0.0045, 3)), percent(Stat(0.5, None, 1)), percent(None)
    ('61.2 ± 0.5', '50.0', '-')
    """
    if stat is None:
        return NONE
    error = None if stat.error is None else 100 * stat.error
    return number(Stat(100 * stat.mean, error, stat.count), digits=1)


def number(stat: Stat | None, *, digits: int) -> str:
    """Write a mean with its standard error; that is left out where all values are equal.

    >>> number(Stat(1234.5, 10.2, 3), digits=0), number(Stat(2.0, 0.0, 3), digits=1)
    ('1,234 ± 10', '2.0')
    >>> number(Stat(59.7, 0.01, 3), digits=1)
    '59.7 ± 0.0'
    """
    if stat is None:
        return NONE
    text = f"{stat.mean:,.{digits}f}"
    error = "" if stat.error is None else f"{stat.error:,.{digits}f}"
    exact = stat.error is None or stat.error < 1e-9
    return text if exact else f"{text} ± {error}"


def rich_table(study: Study) -> Table:
    """Return the comparison for the terminal."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method / variant", overflow="fold")
    for column in (*COLUMNS, SEEDS):
        table.add_column(column.header, justify="right", no_wrap=True)
    for group in study.groups:
        cells = [column.cell(group) for column in (*COLUMNS, SEEDS)]
        table.add_row(f"[bold]{escape(group.label)}[/]", *cells)
        for member in group.left_out:
            table.add_row(f"  [yellow]seed {member.seed}: {escape(member.left_out)}[/]")
    return table


def markdown(study: Study, *, source: str) -> str:
    """Return the comparison as Markdown: the table, what the columns mean, what is left out."""
    shown = columns(study)
    header = ["method / variant", *(c.header for c in shown), "seeds", "status"]
    lines = [_row(header), _row(["---", *["---:"] * (len(shown) + 1), "---"])]
    for group in study.groups:
        cells = [column.cell(group) for column in shown]
        lines.append(_row([group.label, *cells, SEEDS.cell(group), status(group)]))
    meanings = [f"- {c.header}: {c.meaning}" for c in (*shown, SEEDS)]
    unreadable = [f"- cannot be read: {fault}" for fault in study.unreadable]
    return "\n".join([
        *lines, "", "Mean ± standard error over seeds; only completed runs, one for each seed.",
        "", *meanings, *unreadable, "", f"Made by `{source}`.", "",
    ])  # fmt: skip


def run_rows(study: Study) -> list[tuple[str, ...]]:
    """Return a row for each run: name, seed, status, accuracy, rounds, time, command."""
    rows: list[tuple[str, ...]] = []
    for group in study.groups:
        for member in group.members:
            last, resumed = member.last("accuracy_micro"), member.note.get("resumed_after")
            state = member.status + (f", resumed after round {resumed[-1]}" if resumed else "")
            rows.append((
                group.label, str(member.seed), state,
                NONE if last is None else f"{100 * last:.1f}",
                f"{member.rounds}/{member.asked_rounds}",
                clock(member.total("seconds_round")), member.run.name,
            ))  # fmt: skip
    return rows


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
