"""The numbers of a study as rows of text: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from common.files import printable
from common.methods import METHODS
from experiments.report.groups import Group, Stat, Study
from experiments.report.looks import method_label
from experiments.report.runs import Run
from experiments.report.settings import complete_settings

Cell = Callable[[Group], str]
NONE = "-"
OTHER_PREFIX = "accuracy_"
NAMED = ("micro", "macro", "std", "worst10", "own", "common", "alone", "validation")
"""What of `accuracy_...` has a column of its own."""
ERRORS = "Mean ± standard error over seeds; only completed runs, one for each seed."


@dataclass(frozen=True)
class Column:
    """A column: its header, what it means, and how a group's cell is written.

    One that is not `always` there is left out where no group has anything to write in it.
    """

    header: str
    meaning: str
    cell: Cell
    always: bool = True


def _share(key: str) -> Cell:
    return lambda group: percent(group.last(key))


def _total(key: str, *, size: float, digits: int) -> Cell:
    return lambda group: number(group.stat(lambda run: run.total(key) / size), digits=digits)


def _span(value: Callable[[Run], float | None]) -> Cell:
    """Write a whole number, or the smallest and the largest over the seeds."""

    def cell(group: Group) -> str:
        found = sorted(int(v) for run in group.counted if (v := value(run)) is not None)
        return "-".join(str(v) for v in dict.fromkeys((found[0], found[-1]))) if found else NONE

    return cell


def _other_predictors(group: Group) -> str:
    keys = {key for run in group.counted for key in run.summary.get("last") or {}}
    names = sorted(k.removeprefix(OTHER_PREFIX) for k in keys if k.startswith(OTHER_PREFIX))
    names = [name for name in names if name not in NAMED]
    return ", ".join(f"{name} {_share(OTHER_PREFIX + name)(group)}" for name in names) or NONE


def _gain(group: Group) -> str:
    stat = group.stat(lambda run: run.gain.micro if run.gain else None)
    return f"{'+' if stat and stat.mean > 0 else ''}{percent(stat)}"


COLUMNS: tuple[Column, ...] = (
    Column("method / variant", "", lambda group: group.label),
    Column("micro", "last round: correct of all test examples, %", _share("accuracy_micro")),
    Column("own", "last round: micro accuracy of the own models without the common ones, %",
           _share("accuracy_own"), always=False),
    Column("common", "last round: micro accuracy of the clients' common models, %",
           _share("accuracy_common"), always=False),
    Column("alone", "last round: micro accuracy of the same models, trained without the "
           "federation, %", _share("accuracy_alone"), always=False),
    Column("gain", "micro minus alone, of the clients that measured both, points", _gain,
           always=False),
    Column("other predictor", "last round: micro accuracy of what else the method predicts with: "
           "the head (FedProto, FedTGP), the model before its epoch (global: FedAvg + "
           "fine-tuning), %", _other_predictors, always=False),
    Column("macro", "last round: mean of the clients' accuracies, %", _share("accuracy_macro")),
    Column("std", "last round: standard deviation over clients, points", _share("accuracy_std")),
    Column("worst 10 %", "last round: mean of the worst tenth of the clients, %",
           _share("accuracy_worst10")),
    Column("chosen", "micro accuracy of the round that is best on validation examples, %",
           lambda group: percent(group.stat(lambda run: run.best("accuracy_micro"))), always=False),
    Column("round", "the round of it", _span(lambda run: run.best("round")), always=False),
    Column("rounds", "rounds of the run", _span(lambda run: run.rounds_done)),
    Column("MB up", "all clients to the server, whole run", _total("bytes_up", size=1e6, digits=1)),
    Column("MB down", "server to all clients, whole run", _total("bytes_down", size=1e6, digits=1)),
    Column("seconds", "wall clock of all rounds", _total("seconds_round", size=1, digits=0)),
    Column("seeds", "completed runs with different seeds", lambda group: str(len(group.counted))),
)  # fmt: skip


def columns(study: Study) -> list[Column]:
    """Return the columns of a study's table that have something to say."""
    return [c for c in COLUMNS if c.always or any(c.cell(g) != NONE for g in study.groups)]


def status(group: Group) -> str:
    """Say which runs of a group are not in its means, and why."""
    return "; ".join(f"seed {run.seed}: {run.left_out}" for run in group.left_out) or "completed"


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
    exact = stat.error is None or stat.error < 1e-9
    return text if exact else f"{text} ± {stat.error:,.{digits}f}"


def rich_table(study: Study, more: Sequence[Column] = ()) -> Table:
    """Return the comparison for the terminal, with `more` columns behind those of all tables."""
    shown = [*columns(study), *more]
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(shown[0].header, overflow="fold")
    for column in shown[1:]:
        table.add_column(column.header, justify="right", no_wrap=True)
    for group in study.groups:
        label, *cells = (column.cell(group) for column in shown)
        table.add_row(f"[bold]{escape(label)}[/]", *cells)
        for run in group.left_out:
            table.add_row(f"  [yellow]seed {run.seed}: {escape(run.left_out)}[/]")
    for fault in study.unreadable:
        table.add_row(f"[red]{escape(fault)}[/]")
    return table


def markdown(study: Study, *, source: str, more: Sequence[Column] = ()) -> str:
    """Return the comparison as Markdown: the table, what the columns mean, what is left out."""
    shown = [*columns(study), *more]
    rows = [[*(column.cell(group) for column in shown), status(group)] for group in study.groups]
    header = [*(column.header for column in shown), "status"]
    rule = ["---", *["---:"] * (len(shown) - 1), "---"]
    meanings = [f"- {column.header}: {column.meaning}" for column in shown[1:]]
    unreadable = [f"- cannot be read: {printable(fault)}" for fault in study.unreadable]
    return "\n".join([
        *map(_row, (header, rule, *rows)), "", ERRORS, "", *meanings, *unreadable, "",
        f"Made by `{printable(source)}`.", "",
    ])  # fmt: skip


def what_is_tested(study: Study) -> str:
    """Say of the methods in a study what their accuracy is of."""
    found: dict[str, list[str]] = {}
    for method in dict.fromkeys(group.method for group in study.groups):
        known = METHODS.get(method)
        words = known.tested if known else "what this version does not know"
        found.setdefault(words, []).append(method_label(method))
    said = "; ".join(f"{words} ({', '.join(names)})" for words, names in found.items())
    late = any(complete_settings(run.config)["evaluation"] == "fused" for run in study.runs)
    return f"Tested is {said}." + late * (
        ' Runs with evaluation = "fused" are tested when a round begins, so local training is '
        "that of the rounds before."
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"
