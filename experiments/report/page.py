"""One HTML page about a study: it loads nothing, and reads well in the dark and on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import replace_file
from experiments.report import tables
from experiments.report.figures import TITLES, draw_accuracy, draw_gains, inline_svg, swatch
from experiments.report.gain import gains_over_local, missing_runs
from experiments.report.groups import Stat, Study
from experiments.report.lines import Axis, lines_of
from experiments.report.looks import Look, looks_for
from experiments.report.maps import SCALE, embedding_maps
from experiments.report.settings import run_command, short_path, sweep_command
from experiments.run.progress import clock

CAPTIONS: Mapping[Axis, str] = {
    "round": "A round is one pass over the clients.",
    "bytes": "Sent so far, to and from all clients; a line across the chart: no traffic.",
    "seconds": "Wall clock of the rounds so far, mean over seeds, on the machine of the runs.",
}
LONGEST_REASON, LONGEST_NAME = 240, 17


def write_report(folder: Path, study: Study, *, num_maps: int) -> tuple[Path, Path]:
    """Write report.html and report.md into the folder of the runs; return their paths.

    At most `num_maps` runs' embeddings are drawn.
    """
    page, table = folder / "report.html", folder / "report.md"
    command = f"mh-pfedhn report {short_path(folder)}"
    replace_file(page, render(folder.name, study, command, num_maps=num_maps))
    replace_file(table, tables.markdown(study, source=command))
    return page, table


def render(name: str, study: Study, command: str, *, num_maps: int) -> str:
    """Return the page about a study; `command`, which makes it again, is stated in it."""
    place = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(place), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    looks = looks_for([(group.key, group.method) for group in study.groups])
    gains, unmatched = gains_over_local(study)
    gain_figure = inline_svg(
        partial(draw_gains, gains=gains, looks=looks),
        height_in=1.1 + 0.65 * len(gains), title="Gain of every client over training alone",
    ) if gains else ""  # fmt: skip
    maps, passed_over = embedding_maps(study, limit=num_maps)
    return environment.get_template("page.html").render(
        style=(place / "page.css").read_text(encoding="utf-8"),
        name=name, study=study, facts=_facts(study), finding=_finding(study),
        columns=tables.columns(study), errors=tables.ERRORS,
        best=max((s.mean for g in study.groups if (s := g.last("accuracy_micro"))), default=None),
        swatches={key: swatch(look) for key, look in looks.items()},
        tested=tables.what_is_tested(study), figures=_accuracy_figures(study, looks),
        several=any(len(group.counted) > 1 for group in study.groups),
        gains=gains, gain_figure=gain_figure, missing=missing_runs(unmatched),
        no_local=not gains and not any(item.differs for item in unmatched),
        families=list(dict.fromkeys(name for gain in gains for name in gain.by_family)),
        maps=maps, passed_over=passed_over, scale=SCALE, clock=clock,
        commands=_commands(study), made=_made_by(study, command), longest_reason=LONGEST_REASON,
    )  # fmt: skip


def _facts(study: Study) -> list[str]:
    runs = study.runs
    done = sum(run.status == "completed" for run in runs)
    data = sorted({str(run.config.get("dataset", "?")) for run in runs})
    clients = sorted({int(run.summary.get("num_clients", 0)) for run in runs} - {0})
    return [
        f"{len(runs)} runs, {done} completed", f"{len(study.groups)} settings",
        f"seeds {', '.join(map(str, sorted({run.seed for run in runs})))}",
        f"data {', '.join(data)}", f"{' or '.join(map(str, clients)) or '?'} clients",
        f"{datetime.now():%Y-%m-%d %H:%M}",
    ]  # fmt: skip


def _finding(study: Study) -> tuple[str, str, str]:
    """Say what came out, with the errors, and how Local did; the middle part is the best's name."""
    scored = [(g, stat) for g in study.groups if (stat := g.last("accuracy_micro"))]
    if not scored:
        return "No run has completed yet; what is drawn below comes from unfinished runs.", "", ""
    group, best = max(scored, key=lambda pair: pair[1].mean)
    rivals = [pair for pair in scored if pair[0] is not group]
    alone = [pair for pair in rivals if pair[0].method == "local"]
    said = f", {_seeded(best)}."
    for other, stat in alone:
        name = "Local" if len(alone) == 1 else other.label
        said += f" Every client alone ({name}): {_seeded(stat)}."
    if rivals and best.error is not None:
        second, stat = max(rivals, key=lambda pair: pair[1].mean)
        if stat.error is not None and best.mean - stat.mean < best.error + stat.error:
            said += f" {second.label} is within the standard errors of it."
    return "Highest micro accuracy in the last round: ", group.label, said


def _seeded(stat: Stat) -> str:
    plural = "s" if stat.count > 1 else ", no standard error"
    return f"{tables.percent(stat)} % ({stat.count} seed{plural})"


def _accuracy_figures(study: Study, looks: Mapping[str, Look]) -> list[tuple[str, str, str]]:
    """Return the heading, the SVG and the caption of each chart."""
    figures = []
    for axis, caption in CAPTIONS.items():
        if lines := lines_of(study, looks, axis):
            draw = partial(draw_accuracy, lines=lines, axis=axis, longest=LONGEST_NAME)
            svg = inline_svg(draw, height_in=4.6, title=f"Test accuracy {TITLES[axis].lower()}")
            figures.append((TITLES[axis], svg, caption))
    return figures


def _made_by(study: Study, command: str) -> list[str]:
    """Return the commands behind every figure: those that ran, and the one that draws."""
    sweeps = {sweep_command(run) for run in study.runs}
    alone = ["the commands of the runs at the end of this page"] if "" in sweeps else []
    return [*sorted(sweeps - {""}), *alone, command]


def _commands(study: Study) -> dict[Path, str]:
    """Return the command of every run; short where only the seed differs from the run above."""
    commands, before = {}, ""
    for run in study.runs:
        command = run_command(run)
        pattern = command.replace(f"--seed {run.seed}", "--seed")
        commands[run.folder] = f"the same, --seed {run.seed}" if pattern == before else command
        before = pattern
    return commands
